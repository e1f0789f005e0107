"""The card of a pushed selection: the header that `datasets` loads by, and a section of ours between two markers.

Does: keep what others wrote, header and text; replace our section; name the splits that a push would break.
Does not: invent a licence or a language; render templates (publishing.py); ask a Hub.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from car_datasets.conflicts import refuse_hidden_data, refuse_unknown_splits, refuse_unloadable
from car_datasets.publishing import card_templates

if TYPE_CHECKING:
    from datasets import Features
    from huggingface_hub import DatasetCard

    from car_datasets.receipt import Receipt
    from car_datasets.reporting import SelectionReport

BEGIN, END = "<!-- car_datasets: begin -->", "<!-- car_datasets: end -->"
TAGS = ("car", "data-selection", "instruction-tuning")
CARRIED = ("license", "license_name", "license_link", "language")  # from the source's card


class SplitFiles(NamedTuple):
    """A split in the repository: its files, rows, bytes in memory and bytes on disk."""

    names: list[str]
    rows: int
    num_bytes: int
    size: int


def data_folder_of(config_name: str) -> str:
    """The folder of a configuration's files, as `push_to_hub` names it."""
    return "data" if config_name == "default" else config_name


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def place_of(text: str) -> tuple[str, str] | None:
    """Configuration and split of the selection that our section of a card is about; `None` where there is no section."""
    section = re.search(f"{BEGIN}(.*?){END}", text, flags=re.DOTALL)
    call = section and re.search(r'load_dataset\("[^"]*", (?:"([^"]*)", )?split="([^"]*)"\)', section[1])
    return (call[1] or "default", call[2]) if call else None


def stale_files(
    files: Iterable[str], config_name: str, splits: Mapping[str, SplitFiles], dropped: Iterable[str] = ()
) -> list[str]:
    """Files of an earlier push of these splits, which the new ones do not replace, and those of splits that go."""
    new = {name for split in splits.values() for name in split.names}
    pattern = "|".join(map(re.escape, [*splits, *dropped]))
    ours = re.compile(rf"{re.escape(data_folder_of(config_name))}/({pattern})-\d{{5}}-of-\d{{5}}\.parquet")
    return [name for name in files if ours.fullmatch(name) and name not in new]


def with_header(
    card: str,
    files: Iterable[str],
    config_name: str,
    features: Features,
    splits: Mapping[str, SplitFiles],
    repo_id: str,
    dropped: Collection[str] = (),
) -> tuple[DatasetCard, dict[str, int]]:
    """The card with `configs` and `dataset_info` that hold these splits beside the others, and the rows of each of them.

    Args:
        card (`str`): the repository's, `""` for none.
        files (`Iterable`): all names in the repository.
        config_name (`str`), features (`Features`), splits (`Mapping`): what is pushed.
        repo_id (`str`): for messages.
        dropped (`Collection[str]`): splits of this configuration that go.

    Raises:
        ValueError: another split of this configuration has other columns, or what is there, or what is pushed, could not be
            loaded afterwards, see [`~car_datasets.conflicts.refuse_unloadable`].
    """
    from datasets import DatasetInfo, SplitDict, SplitInfo
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        found = DatasetCard(card or "---\n{}\n---\n")
        infos = DatasetInfosDict.from_dataset_card_data(found.data)
        configs = MetadataConfigs.from_dataset_card_data(found.data)
    except Exception as error:  # the YAML library's errors, and others by what the header holds
        raise ValueError(
            f"repo_id={repo_id!r}: its card's header cannot be read ({_line(error)}). Mend README.md there."
        ) from error
    config = configs.get(config_name, {})
    files = list(files)
    refuse_unloadable(configs, config_name, (*splits, *dropped), files, repo_id)
    named = config.get("data_files") or []
    if not configs or (config_name in configs and (not named or not all(isinstance(each, dict) for each in named))):
        new = [name for split in splits.values() for name in split.names]
        refuse_hidden_data(files, {*new, *stale_files(files, config_name, splits)}, repo_id)
        config.pop("data_files", None)
    info = infos.get(config_name, DatasetInfo())
    old = {name: split for name, split in (info.splits or {}).items() if name not in (*splits, *dropped)}
    if old and info.features is not None and info.features != features:
        differing = sorted(
            name for name in {*info.features, *features} if info.features.get(name) != features.get(name)
        )
        raise ValueError(
            f"repo_id={repo_id!r} holds the split(s) {sorted(old)} with other columns or types ({differing}), and all splits of "
            "one configuration must have the same. Push them all again together (also=..., --also), or beside them: "
            "config_name='another' (--config-name another)."
        )
    refuse_unknown_splits(config, config_name, (*splits, *dropped, *old), repo_id)
    total = SplitDict({name: SplitInfo(name, split.num_bytes, split.num_examples) for name, split in old.items()})
    total |= {name: SplitInfo(name, split.num_bytes, split.rows) for name, split in splits.items()}
    merged = DatasetInfo(features=features, splits=total)
    merged.dataset_size = sum(split.num_bytes for split in total.values())
    merged.download_size = None if old else sum(split.size for split in splits.values())  # of old ones not known
    DatasetInfosDict({config_name: merged}).to_dataset_card_data(found.data)
    paths = {each["split"]: each["path"] for each in config.get("data_files", []) if each["split"] not in dropped}
    paths |= {name: f"{data_folder_of(config_name)}/{name}-*" for name in splits}
    config["data_files"] = [{"split": name, "path": path} for name, path in paths.items()]
    MetadataConfigs({config_name: config}).to_dataset_card_data(found.data)
    return found, {name: each.num_examples for name, each in total.items()}


def describe(card: DatasetCard, receipt: Receipt | None, source_card: str | None, rows: int) -> dict[str, Any]:
    """Fill in what the header does not say yet, from the source's card and the receipt; gives what was carried over.

    Args:
        card (`DatasetCard`): of [`with_header`]; its header is changed.
        receipt ([`Receipt`], *optional*): names the source.
        source_card (`str`, *optional*): the text of its card; `None` or `""` if there is none to be had.
        rows (`int`): of all splits.
    """
    source = {} if receipt is None else receipt.source
    carried = _carried_from(source_card, source)
    if not card.data.get("license"):
        for name in CARRIED[:3]:
            if name in carried:
                card.data[name] = carried[name]
    if not card.data.get("language") and "language" in carried:
        card.data["language"] = carried["language"]
    if source.get("kind") == "hub":
        card.data["source_datasets"] = sorted({*map(str, _items(card.data.get("source_datasets"))), source["id"]})
    card.data["tags"] = sorted({*map(str, _items(card.data.get("tags"))), *TAGS})
    card.data["size_categories"] = [size_category(rows)]
    stated = _items(card.data.get("license"))
    return carried if stated == _items(carried.get("license")) else {**carried, "stated": stated}


def forget(card: DatasetCard, source: Mapping[str, Any], source_card: str | None) -> None:
    """Take out of the header what an earlier push carried over from a source that the rows no longer come from.

    Args:
        card (`DatasetCard`): its header is changed.
        source (`Mapping`), source_card (`str`, *optional*): of the earlier receipt. Where its card cannot be had, nobody can
            tell what came from there, and no licence or language stays.
    """
    if source.get("kind") != "hub":
        return
    known = _carried_from(source_card, source)
    for names in (CARRIED[:3], CARRIED[3:]):
        if source_card is None or (names[0] in known and card.data.get(names[0]) == known[names[0]]):
            for name in names:
                card.data[name] = None
    card.data["source_datasets"] = [e for e in _items(card.data.get("source_datasets")) if e != source["id"]] or None


def _carried_from(source_card: str | None, source: Mapping[str, Any]) -> dict[str, Any]:
    """Licence and language of a source's card; the link to the licence's text leads there from anywhere."""
    from huggingface_hub import DatasetCard

    try:
        known = DatasetCard(source_card or "---\n{}\n---\n").data.to_dict()
    except Exception:  # as above; then nothing is known about it
        return {}
    carried = {name: known[name] for name in CARRIED if known.get(name)}
    link = carried.get("license_link")
    if link is not None and not re.match(r"\w+:", str(link)):
        place = f"https://huggingface.co/datasets/{source.get('id')}/blob/{source.get('revision') or 'main'}"
        carried["license_link"] = f"{place}/{str(link).removeprefix('./').lstrip('/')}"
    return carried


def _items(value: Any) -> list[Any]:
    """A header's entry that may be one value or a list of them."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def size_category(rows: int) -> str:
    """The Hub's name for so many rows, such as `"1K<n<10K"`."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    over = sum(rows >= 10**power for power in range(3, 13))
    return "n<1K" if over == 0 else "n>1T" if over == 10 else f"{names[over - 1]}<n<{names[over]}"


def with_section(text: str, section: str, repo_id: str) -> str:
    """A card's text with our section: in the place of the one that is there, or after what others wrote.

    Raises:
        ValueError: our section begins there and does not end: what follows may be ours or not.
    """
    marked = f"{BEGIN}\n{section.strip()}\n{END}"
    if re.search(f"{BEGIN}.*?{END}", text, flags=re.DOTALL):
        return re.sub(f"{BEGIN}.*?{END}", lambda _: marked, text, count=1, flags=re.DOTALL)
    if BEGIN in text:
        raise ValueError(
            f"repo_id={repo_id!r}: its card has {BEGIN!r} and no {END!r} after it. Delete the first in README.md there, with "
            "what belongs to it, or put the second where our section ends."
        )
    before = text.strip() or f"# {repo_id.split('/')[-1]}"
    return f"{before}\n\n{marked}\n"


def render_section(
    repo_id: str,
    config_name: str,
    split: str,
    splits: Mapping[str, int],
    columns: list[str],
    report: SelectionReport | None,
    receipt: Receipt | None,
    carried: Mapping[str, Any],
    plots: list[str],
) -> str:
    """Our section of the card, from `hub_cards/selection_section.md.jinja`."""
    from car_datasets.recipe import Recipe

    recipe = None if receipt is None else Recipe().changed(**receipt.recipe).to_yaml()
    text: str = (
        card_templates()
        .get_template("selection_section.md.jinja")
        .render(
            repo_id=repo_id,
            config_name=config_name,
            split=split,
            splits=splits,
            columns=columns,
            report=report,
            receipt=receipt,
            recipe=recipe,
            carried=carried,
            licences=_items(carried.get("license")),
            plots=plots,
        )
    )
    return text.replace(BEGIN, "").replace(END, "")
