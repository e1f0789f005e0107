"""Write the card of a pushed selection: the header that `datasets` loads by, and our section between two markers.

Does: keep what others wrote in header and text; replace our section; refuse a push that would break other splits.
Does not: invent a licence or a language; send requests to a Hub.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from car_datasets.publishing.conflicts import refuse_hidden_data, refuse_unknown_splits, refuse_unloadable
from car_datasets.results import PLOTS_FOLDER, PROOF_PLOT
from car_datasets.scoring.named import IQS, SCORERS, ScorerName
from car_datasets.utils.hub import card_templates

if TYPE_CHECKING:
    from datasets import DatasetInfo, Features, SplitInfo
    from huggingface_hub import DatasetCard

    from car_datasets.receipt import Receipt
    from car_datasets.reporting.report import SelectionReport

# Markers around our section, which Markdown does not show. `with_section` writes the first, `place_of` reads it back.
END = "<!-- car_datasets: end -->"
BEGIN = re.compile(r"<!-- car_datasets: begin(?: config=(?P<config>\S+) split=(?P<split>\S+))? -->")
SECTION = re.compile(f"{BEGIN.pattern}.*?{END}", flags=re.DOTALL)
SCORED = "scored"  # the split of the entire pool
TAGS = ("car", "data-selection", "instruction-tuning")
CARRIED = ("license", "license_name", "license_link", "language")  # copied from the source's card


class Target(NamedTuple):
    """The repository, configuration and split that the selected rows are pushed to."""

    repo_id: str
    config_name: str
    split: str


class SplitFiles(NamedTuple):
    """A split as written for the repository.

    Args:
        names (`list[str]`): its files.
        rows (`int`): number of rows.
        num_bytes (`int`): size in memory.
        size (`int`): size of the files.
    """

    names: list[str]
    rows: int
    num_bytes: int
    size: int


def data_prefix(config_name: str, split: str) -> str:
    """Return the start of the names of a split's files, `folder/split-`, as `Dataset.push_to_hub` names them."""
    return f"{'data' if config_name == 'default' else config_name}/{split}-"


class Header(NamedTuple):
    """The header of a card, and the two parts of it that `datasets` loads by.

    Args:
        card (`DatasetCard`): the card; [`merge_header`] changes its header.
        infos (`Mapping`): configuration to `DatasetInfo`, from `dataset_info`.
        configs (`Mapping`): configuration to its entry in `configs`.
    """

    card: DatasetCard
    infos: Mapping[str, DatasetInfo]
    configs: Mapping[str, dict[str, Any]]

    def files_by_split(self, config_name: str) -> list[dict[str, Any]] | None:
        """Return the entries of `data_files`, or `None` if `datasets` has to find the splits of its files by itself."""
        # Only the long form names splits; a pattern or a list of patterns leaves them to `datasets`.
        entries = self.configs.get(config_name, {}).get("data_files") or []
        if entries and all(isinstance(entry, dict) for entry in entries):
            return list(entries)
        # A new configuration alongside those that a header names has no files yet.
        return [] if self.configs and config_name not in self.configs else None

    def other_splits(self, config_name: str, replaced: Collection[str]) -> dict[str, SplitInfo]:
        """Return the splits of a configuration that stay as they are."""
        info = self.infos.get(config_name)
        splits = (info and info.splits) or {}
        return {name: split for name, split in splits.items() if name not in replaced}


def read_header(card: str, repo_id: str) -> Header:
    """Parse a card.

    Args:
        card (`str`): the text of the card, `""` if there is none.
        repo_id (`str`): for the error message.

    Raises:
        ValueError: the header is invalid.
    """
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        parsed = DatasetCard(card or "---\n{}\n---\n")
        infos = DatasetInfosDict.from_dataset_card_data(parsed.data)
        configs = MetadataConfigs.from_dataset_card_data(parsed.data)
    except Exception as error:  # the YAML library's errors, and others that depend on what the header holds
        raise ValueError(
            f"repo_id={repo_id!r}: its card's header cannot be read ({_line(error)}). Fix README.md there."
        ) from error
    return Header(parsed, infos, configs)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def check_header(
    header: Header,
    target: Target,
    features: Features,
    splits: Mapping[str, SplitFiles],
    files: Collection[str],
    dropped: Collection[str] = (),
) -> None:
    """Raise ValueError if a push would leave a repository that cannot be loaded, or hide data that is there.

    Args:
        header ([`Header`]): of the card in the repository.
        target ([`Target`]), features (`Features`), splits (`Mapping`): what is pushed.
        files (`Collection[str]`): all names in the repository.
        dropped (`Collection[str]`): splits of this configuration that the push deletes.

    Raises:
        ValueError: another split of this configuration has other columns; data files are in no split that the header
            names; or `datasets` could not load the repository after the push.
    """
    repo_id, config_name, _ = target
    replaced = (*splits, *dropped)
    refuse_unloadable(header.configs, config_name, replaced, files, repo_id)
    # Without entries for its splits, `datasets` loads all files that it finds; with entries for our splits, only those.
    implicit = header.files_by_split(config_name) is None
    if implicit:
        new = [name for split in splits.values() for name in split.names]
        refuse_hidden_data(files, {*new, *stale_files(files, config_name, splits)}, repo_id)
    others = header.other_splits(config_name, replaced)
    # With no other split left, the columns may change.
    known = header.infos[config_name].features if others else None
    if known is not None and known != features:
        differing = sorted(name for name in {*known, *features} if known.get(name) != features.get(name))
        raise ValueError(
            f"repo_id={repo_id!r} holds the split(s) {sorted(others)} with other columns or types ({differing}), and "
            "all splits of one configuration must have the same. Push them all again together (also=..., --also), or "
            "push these rows under another configuration: config_name='another' (--config-name another)."
        )
    if not implicit:
        config = header.configs.get(config_name, {})
        refuse_unknown_splits(config, config_name, (*replaced, *others), repo_id)


def merge_header(
    header: Header,
    target: Target,
    features: Features,
    splits: Mapping[str, SplitFiles],
    dropped: Collection[str] = (),
) -> dict[str, int]:
    """Write pushed splits into `configs` and `dataset_info` of a header that [`check_header`] accepted.

    Args:
        header ([`Header`]): its card is changed.
        target ([`Target`]), features (`Features`), splits (`Mapping`): what is pushed.
        dropped (`Collection[str]`): splits of this configuration that the push deletes.

    Returns:
        `dict[str, int]`: rows of each split of this configuration after the push.
    """
    from datasets import DatasetInfo, SplitDict, SplitInfo
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs

    config_name = target.config_name
    others = header.other_splits(config_name, (*splits, *dropped))
    total = SplitDict({name: SplitInfo(name, split.num_bytes, split.num_examples) for name, split in others.items()})
    total |= {name: SplitInfo(name, split.num_bytes, split.rows) for name, split in splits.items()}
    merged = DatasetInfo(features=features, splits=total)
    # As `push_to_hub` of `datasets` sums it, over all splits of the configuration.
    merged.dataset_size = sum(split.num_bytes for split in total.values())
    # The header has no sizes on disk for single splits, so with other splits the sum is not known.
    merged.download_size = None if others else sum(split.size for split in splits.values())
    DatasetInfosDict({config_name: merged}).to_dataset_card_data(header.card.data)
    named = header.files_by_split(config_name) or []
    # Entries of other splits stay, also those of files in folders that we would not choose.
    paths = {entry["split"]: entry["path"] for entry in named if entry["split"] not in dropped}
    paths |= {name: f"{data_prefix(config_name, name)}*" for name in splits}
    entries = [{"split": name, "path": path} for name, path in paths.items()]
    config = {**header.configs.get(config_name, {}), "data_files": entries}
    MetadataConfigs({config_name: config}).to_dataset_card_data(header.card.data)
    return {name: split.num_examples for name, split in total.items()}


def stale_files(
    files: Iterable[str], config_name: str, splits: Mapping[str, SplitFiles], dropped: Iterable[str] = ()
) -> list[str]:
    """Return the files to delete: those of dropped splits, and those of an earlier push that are not overwritten."""
    # A split that shrinks has fewer files than before; `datasets` would load the old ones along with the new.
    new = {name for split in splits.values() for name in split.names}
    pattern = "|".join(re.escape(data_prefix(config_name, split)) for split in [*splits, *dropped])
    ours = re.compile(rf"({pattern})\d{{5}}-of-\d{{5}}\.parquet")
    return [name for name in files if ours.fullmatch(name) and name not in new]


def describe(card: DatasetCard, receipt: Receipt | None, source_card: str | None, rows: int) -> dict[str, Any]:
    """Fill in what the header does not say yet, from the source's card and the receipt.

    Args:
        card (`DatasetCard`): its header is changed.
        receipt ([`Receipt`], *optional*): names the source.
        source_card (`str`, *optional*): the text of the source's card; `None` or `""` if it is not available.
        rows (`int`): number of rows of all splits.

    Returns:
        `dict`: licence and language of the source, and under `stated` the header's own licence if that is another.
    """
    source = {} if receipt is None else receipt.source
    carried = _carried_from(source_card, source)
    # The three belong together: `license_name` and `license_link` describe `license: other`.
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
    # The owner of the repository may have set another licence; the section then shows both.
    stated = _items(card.data.get("license"))
    return carried if stated == _items(carried.get("license")) else {**carried, "stated": stated}


def forget(card: DatasetCard, source: Mapping[str, Any], source_card: str | None) -> None:
    """Remove from the header what an earlier push copied from a source that the rows no longer come from.

    Args:
        card (`DatasetCard`): its header is changed.
        source (`Mapping`): the source of the earlier receipt.
        source_card (`str`, *optional*): the text of that source's card. If it is not available, nobody can tell what
            was copied from there, so licence and language are removed.
    """
    if source.get("kind") != "hub":
        return
    known = _carried_from(source_card, source)
    # The three entries about the licence go together; the language goes alone.
    for names in (CARRIED[:3], CARRIED[3:]):
        if source_card is None or (names[0] in known and card.data.get(names[0]) == known[names[0]]):
            for name in names:
                card.data[name] = None
    card.data["source_datasets"] = [e for e in _items(card.data.get("source_datasets")) if e != source["id"]] or None


def _carried_from(source_card: str | None, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return licence and language of a source's card, with a relative link to the licence's text made absolute."""
    from huggingface_hub import DatasetCard

    try:
        known = DatasetCard(source_card or "---\n{}\n---\n").data.to_dict()
    except Exception:  # an invalid card of someone else's must not stop the push
        return {}
    carried = {name: known[name] for name in CARRIED if known.get(name)}
    link = carried.get("license_link")
    if link is not None and not re.match(r"\w+:", str(link)):
        place = f"https://huggingface.co/datasets/{source.get('id')}/blob/{source.get('revision') or 'main'}"
        carried["license_link"] = f"{place}/{str(link).removeprefix('./').lstrip('/')}"
    return carried


def _items(value: Any) -> list[Any]:
    """Return an entry of a header, which may be one value or a list of values, as a list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def size_category(rows: int) -> str:
    """Return the Hub's category for a number of rows, such as `"1K<n<10K"`."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    over = sum(rows >= 10**power for power in range(3, 13))
    return "n<1K" if over == 0 else "n>1T" if over == 10 else f"{names[over - 1]}<n<{names[over]}"


def render_section(
    target: Target,
    splits: Mapping[str, int],
    columns: list[str],
    report: SelectionReport | None,
    receipt: Receipt | None,
    carried: Mapping[str, Any],
    plots: list[str],
) -> str:
    """Render our section of the card, as Markdown without its markers.

    Args:
        target ([`Target`]): where the selection is.
        splits (`Mapping[str, int]`): split to its rows; columns (`list[str]`): the columns of all splits.
        report ([`SelectionReport`], *optional*), receipt ([`Receipt`], *optional*): those of the selection.
        carried (`Mapping`): what [`describe`] returned about licence and language.
        plots (`list[str]`): names of images in the repository.
    """
    from car_datasets.recipe import Recipe

    recipe = None if receipt is None else Recipe().changed(**receipt.recipe).to_yaml()
    scorer = ScorerName(IQS, "") if receipt is None else ScorerName.of_record(receipt.scorer)
    text: str = (
        card_templates()
        .get_template("selection_section.md.jinja")
        .render(
            **target._asdict(),
            splits=splits,
            columns=columns,
            report=report,
            receipt=receipt,
            recipe=recipe,
            scorer=str(scorer),
            meaning=SCORERS[scorer.kind].meaning,
            carried=carried,
            licences=_items(carried.get("license")),
            plots=plots,
            proof_plot=f"{PLOTS_FOLDER}/{PROOF_PLOT}",
        )
    )
    # A marker in a column's or file's name would end our section early.
    return text.replace("<!-- car_datasets:", "<! car_datasets:")


def with_section(text: str, section: str, target: Target) -> str:
    """Return a card's text with our section, which replaces an earlier one or follows what others wrote.

    Args:
        text (`str`): the card without its header.
        section (`str`): what [`render_section`] returned.
        target ([`Target`]): where the selection is; its names go into the marker, by which [`place_of`] finds them.

    Raises:
        ValueError: an earlier section begins and does not end, so it is unclear what follows it.
    """
    begin = f"<!-- car_datasets: begin config={target.config_name} split={target.split} -->"
    marked = f"{begin}\n{section.strip()}\n{END}"
    if SECTION.search(text):
        # A function, because a string would have its backslashes and group references replaced.
        return SECTION.sub(lambda _: marked, text, count=1)
    if unended := BEGIN.search(text):
        raise ValueError(
            f"repo_id={target.repo_id!r}: its card has {unended[0]!r} and no {END!r} after it. In README.md there, "
            "delete the first and the section that follows it, or add the second at the end of that section."
        )
    # A new card has no title yet, under which the Hub would show the section.
    before = text.strip() or f"# {target.repo_id.split('/')[-1]}"
    return f"{before}\n\n{marked}\n"


def place_of(text: str) -> tuple[str, str] | None:
    """Return configuration and split of the selection that a card describes, `None` if it has no section of ours."""
    section = SECTION.search(text)
    if section is None:
        return None
    if section["config"]:
        return section["config"], section["split"]
    # To be removed in 0.3: cards of 0.1 have no names in the marker, only an example of how to load the selection.
    call = re.search(r'load_dataset\("[^"]*", (?:"([^"]*)", )?split="([^"]*)"\)', section[0])
    return (call[1] or "default", call[2]) if call else None
