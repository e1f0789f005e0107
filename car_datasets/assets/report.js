"use strict";
// Everything that comes from rows is set as text, never as HTML: it may hold markup.
const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.rows;
const byId = (id) => document.getElementById(id);
const PAGE = 50; // rows of the search shown at a time
const SNIPPET = 200; // characters of a row in a table

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function button(text, className, action) {
  const made = element("button", text, className);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

const count = (value) => value.toLocaleString("en");
const number = (value, digits) => (value === null ? "none" : value.toFixed(digits));
const kept = (row) => (row.by ? "kept by " + row.by : "not kept");
const visible = (row, which) => which === "all" || (which === "kept") === Boolean(row.by);
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const named = (cluster) => (cluster === null ? "" : cluster + (data.names[cluster] ? " " + data.names[cluster] : ""));
const briefly = (cluster) => named(cluster).split(", ").slice(0, 2).join(", ");
const place = (row) => (row.crank ? count(row.crank) + " of " + count(data.sizes[row.cluster] || 0) : "");
const indexOf = new Map(rows.map((row, i) => [row.id, i]));

// texts -------------------------------------------------------------------------------------------------------------

// The parts of a row: fields, or the turns of a chat, each with the name of its column or its role.
const partsOf = (row) => row.fields.flatMap(([name, value]) => (typeof value === "string" ? [[name, value]] : value));
const cut = (text, limit) => (text.length <= limit ? text : text.slice(0, Math.max(0, limit - 1)) + "…");

function snippet(row) {
  const parts = partsOf(row).map(([name, text]) => [name, text.split(/\s+/).filter(Boolean).join(" ")]).slice(0, 6);
  let room = SNIPPET;
  // Short parts are kept in full; the longer ones share what remains.
  parts.map((part, i) => [part[1].length, i]).sort((a, b) => a[0] - b[0] || a[1] - b[1]).forEach(([, i], done) => {
    parts[i][1] = cut(parts[i][1], Math.max(1, Math.floor(room / (parts.length - done))));
    room -= parts[i][1].length;
  });
  return parts;
}

function fullText(row, heading) {
  const box = element("div");
  for (const [name, value] of row.fields) {
    box.append(element(heading, name));
    if (typeof value === "string") { box.append(element("div", value, "full")); continue; }
    for (const [role, content] of value) {
      const turn = element("div", undefined, /^(assistant|gpt|model|bot)$/.test(role) ? "turn assistant" : "turn");
      turn.append(element("b", role), content);
      box.append(turn);
    }
  }
  return box;
}

function textCell(row) {
  const cell = element("td", undefined, "text"), box = element("details"), summary = element("summary");
  for (const [name, text] of snippet(row)) {
    const part = element("span", undefined, "part");
    part.append(element("span", name, "label"), text);
    summary.append(part, " ");
  }
  box.append(summary);
  // Filled when it is opened: thousands of long texts would make the page slow.
  box.addEventListener("toggle", () => { if (box.open && box.childElementCount === 1) box.append(fullText(row, "b")); });
  cell.append(box);
  return cell;
}

// tables ------------------------------------------------------------------------------------------------------------

function markSorted(table, column, falling) {
  [...table.tHead.rows[0].cells].forEach((head, i) => head.removeAttribute("aria-sort"));
  if (column !== null) table.tHead.rows[0].cells[column].setAttribute("aria-sort", falling ? "descending" : "ascending");
}

// Compare numbers by size, and texts by their letters; cells without a number come last.
function compare(a, b, falling) {
  if (typeof a === "number" && typeof b === "number") return falling ? b - a : a - b;
  if (typeof a === typeof b) return falling ? String(b).localeCompare(String(a), "en", { numeric: true }) : String(a).localeCompare(String(b), "en", { numeric: true });
  return typeof a === "number" ? -1 : 1;
}

function scrolled(table, label) {
  const box = element("div", undefined, "wide");
  box.append(table);
  describe(box, label);
  return box;
}

// A table that may be wider than the screen must be reached, and scrolled, by the keyboard.
function describe(box, label) {
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", label);
}

const valueOf = (text) => {
  const plain = text.replace(/,/g, "").replace(/ (%|times)$/, "").replace(/ of \d+$/, "");
  return plain !== "" && !isNaN(plain) ? Number(plain) : text;
};

// Sort the rows of a table of the template by what its cells say.
function makeSortable(table) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const text = head.textContent;
    if (!text) return;
    head.replaceChildren(button(text, "", () => {
      const falling = head.getAttribute("aria-sort") !== "descending";
      markSorted(table, column, falling);
      for (const body of table.tBodies) {
        const key = (line) => valueOf(line.cells[column].textContent);
        body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b), falling)));
      }
    }));
  });
}

const COLUMNS = [ // of a table of rows: name, what it is sorted by, class
  ["row", (row) => row.id, "number"],
  ["score", (row) => row.score, "number"],
  ["kept", (row) => row.by || "no", ""],
  ["cluster", (row) => row.cluster, "more"],
  ["rank in its cluster", (row) => row.crank || null, "number more"],
  [data.unit, (row) => row.length, "number more"],
  ["text", null, ""],
];

function lineOf(row) {
  const line = element("tr", undefined, "row"), head = element("td", undefined, "number");
  const opener = button(String(row.id), "plain", () => explain(row));
  opener.setAttribute("aria-label", "Row " + row.id + ": why it was " + (row.by ? "kept" : "not kept"));
  head.append(opener);
  line.append(head, element("td", number(row.score, 3), "number"), element("td", row.by || "no"));
  line.append(element("td", briefly(row.cluster), "more"), element("td", place(row), "number more"));
  line.append(element("td", count(row.length), "number more"), textCell(row));
  line.addEventListener("click", (event) => { if (!event.target.closest("button, details")) explain(row); });
  return line;
}

// A table of rows that sorts all of them, of which it may show only the first.
function tableOf(shown, label, limit, sorting) {
  const table = element("table"), head = table.createTHead().insertRow(), body = table.createTBody();
  const fill = () => {
    const ordered = sorting.column === null ? shown : [...shown].sort((a, b) => {
      const key = COLUMNS[sorting.column][1];
      return compare(key(a), key(b), sorting.falling);
    });
    body.replaceChildren(...ordered.slice(0, limit).map(lineOf));
    markSorted(table, sorting.column, sorting.falling);
  };
  COLUMNS.forEach(([name, key, className], column) => {
    const cell = element("th", key ? undefined : name, className);
    cell.scope = "col";
    if (key) cell.append(button(name, "", () => {
      sorting.falling = sorting.column === column ? !sorting.falling : true;
      sorting.column = column;
      fill();
    }));
    head.append(cell);
  });
  fill();
  return scrolled(table, label);
}

const unsorted = () => ({ column: null, falling: true });

function chooser(select, options, show) {
  for (const [value, label] of options) select.add(new Option(label, value));
  select.addEventListener("change", () => show(select.value));
  if (options.length) show(select.value);
}

for (const table of document.querySelectorAll("table.sorted")) makeSortable(table);
for (const box of document.querySelectorAll("main .wide")) {
  let title = box;
  while (title && !/^H[23]$/.test(title.tagName)) title = title.previousElementSibling;
  describe(box, title ? title.textContent : "Table");
}

chooser(byId("decile"), data.deciles.map((d, i) => [i, d.name]), (i) => {
  byId("deciles").replaceChildren(tableOf(data.deciles[i].rows.map((r) => rows[r]), "Rows of this tenth", 100, unsorted()));
});

// clusters ------------------------------------------------------------------------------------------------------------

function clusterTable() {
  const table = element("table"), head = table.createTHead().insertRow(), body = table.createTBody();
  const typical = data.clusters.some((c) => c.typical !== null);
  const names = ["cluster", "rows", "kept", "share kept", "mean score", ...(typical ? ["typical row"] : [])];
  names.forEach((name, i) => {
    const cell = element("th", name, ["", "number", "number", "number more", "number more", ""][i]);
    cell.scope = "col";
    head.append(cell);
  });
  for (const cluster of data.clusters) {
    const line = body.insertRow();
    const name = element("th", named(cluster.label));
    name.scope = "row";
    line.append(name, element("td", count(cluster.rows), "number"), element("td", count(cluster.kept), "number"));
    line.append(element("td", (100 * cluster.kept / cluster.rows).toFixed(1) + " %", "number more"), element("td", cluster.mean.toFixed(3), "number more"));
    if (!typical) continue;
    const cell = element("td", undefined, "text");
    if (cluster.typical !== null) {
      const row = rows[cluster.typical];
      cell.append(button(cut((snippet(row)[0] || ["", "row " + row.id])[1], 90), "plain", () => explain(row)));
    }
    line.append(cell);
  }
  makeSortable(table);
  byId("named").append(table);
}
clusterTable();

const ended = data.clusters.filter((c) => c.best.length);
chooser(byId("cluster"), ended.map((c, i) => [i, named(c.label) + " (" + count(c.rows) + " rows, " + count(c.kept) + " kept)"]), (i) => {
  const parts = [["Best", ended[i].best], ["Worst", ended[i].worst]].filter((part) => part[1].length);
  byId("ends").replaceChildren(...parts.flatMap(([name, list]) =>
    [element("h4", name), tableOf(list.map((r) => rows[r]), name + " rows of this cluster", 100, unsorted())]));
});

// search --------------------------------------------------------------------------------------------------------------

let limit = PAGE;
const order = unsorted();
// A row that is named by text is found by that text; numbers only as entire words, or 7 would find 17 and 70.
const haystacks = rows.map((row) => [typeof row.id === "string" ? row.id : "", ...partsOf(row).map((part) => part[1])].join(" ").toLowerCase());

function search() {
  const precise = []; // "row 17" and "cluster 3" name one row or cluster, and are not words to look for
  const rest = byId("search").value.toLowerCase().replace(/\b(row|cluster)[\s:]+(\d+)(?!\S)/g, (_, what, name) => { precise.push([what, name]); return " "; });
  const words = rest.split(/\s+/).filter(Boolean);
  const which = byId("which").value;
  const found = rows.filter((row, i) => visible(row, which)
    && precise.every(([what, name]) => String(what === "row" ? row.id : row.cluster) === name)
    && words.every((word) => haystacks[i].includes(word) || String(row.id) === word));
  const part = data.searched ? "; of long rows " + count(data.searched) + " characters are searched" : "";
  byId("found").textContent = count(found.length) + " of " + count(rows.length) + " rows on this page" + part;
  byId("rows").replaceChildren(tableOf(found, "Rows that were found", limit, order));
  byId("more").hidden = found.length <= limit;
}

for (const id of ["search", "which"]) byId(id).addEventListener("input", () => { limit = PAGE; search(); });
byId("more").addEventListener("click", () => { limit += PAGE; search(); });
search();

// the story of a row --------------------------------------------------------------------------------------------------

const dialog = byId("why");

function facts(pairs) {
  const list = element("dl");
  for (const [name, ...value] of pairs) {
    const line = element("div"), described = element("dd");
    described.append(...value);
    line.append(element("dt", name), described);
    list.append(line);
  }
  return list;
}

function near([id, similarity, score, taken]) {
  const words = "row " + id, rest = " (similarity " + similarity.toFixed(3) + ", score " + number(score, 3) + ", " + (taken ? "kept" : "not kept") + ")";
  const line = element("div");
  // A row that is on this page has a story too.
  line.append(indexOf.has(id) ? button(words, "plain", () => explain(rows[indexOf.get(id)])) : words, rest);
  return line;
}

function explain(row) {
  const box = byId("story"), head = element("header"), title = element("h2", "Row " + row.id);
  title.id = "whose";
  head.append(title, button("Close", "", () => dialog.close()));
  const ranked = row.rank ? ", rank " + count(row.rank) + " of " + count(data.ranked) + "; " + number(row.percentile, 1) + " % of the pool score no better" : "";
  const lines = [
    ["Score", number(row.score, 3) + ranked],
    ["Length", count(row.length) + " " + data.unit + (row.cut ? ", cut before its end" : "")],
    ["Cluster", row.cluster === null ? "none" : named(row.cluster) + (row.crank ? ": rank " + count(row.crank) + " of its " + count(data.sizes[row.cluster] || 0) + " rows" : "")],
  ];
  if (row.near.length) lines.push(["Nearest in its cluster", ...row.near.map(near)]);
  if (row.kept) lines.push(["Nearest kept row", near(row.kept)]);
  box.replaceChildren(head, element("p", capital(row.why)), fullText(row, "h3"), facts(lines));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); }); // beside it

// the map ---------------------------------------------------------------------------------------------------------

const canvas = byId("map");
let spots = []; // the rows that are shown, with their pixels
if (canvas) {
  // Kept rows last, so that they are drawn on top.
  const placed = rows.filter((row) => row.x !== null).sort((a, b) => Boolean(a.by) - Boolean(b.by));
  const scores = placed.map((row) => row.score).sort((a, b) => a - b);
  const [from, to] = data.span;
  const lowest = scores[Math.floor(from * (scores.length - 1))], highest = scores[Math.ceil(to * (scores.length - 1))];
  const context = canvas.getContext("2d");
  // 4 % of margin, in units of the map, whose wider axis goes from -1 to 1.
  const widest = 1.04 * Math.max(0.1, ...placed.map((row) => Math.abs(row.x)));
  const tallest = 1.04 * Math.max(0.1, ...placed.map((row) => Math.abs(row.y)));
  const HIGHEST = 620; // pixels: the map and the words above it fit a screen
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const mix = (a, b, share) => [1, 3, 5].map((i) => Math.round(parseInt(a.slice(i, i + 2), 16) * (1 - share) + parseInt(b.slice(i, i + 2), 16) * share));
  let current = null; // the spot that the keyboard has reached

  // From light to dark, and on a dark page from dark to light, for readers who do not see the hue.
  const scale = () => (dark.matches ? data.scale.slice(0, -1).reverse() : data.scale);

  function colourOf(row, by) {
    if (by === "cluster") return data.palette[row.colour];
    if (by === "taken") return row.by ? style("--bar") : style("--grey");
    const stops = scale(), share = Math.min(1, Math.max(0, (row.score - lowest) / (highest - lowest || 1))) * (stops.length - 1);
    const step = Math.min(stops.length - 2, Math.floor(share));
    return "rgb(" + mix(stops[step], stops[step + 1], share - step).join(" ") + ")";
  }

  // The largest first; each in the middle of its rows.
  const centres = Object.values(Object.groupBy ? Object.groupBy(placed.filter((row) => row.cluster !== null), (row) => row.cluster) : {})
    .sort((a, b) => b.length - a.length)
    .map((members) => {
      const middle = (key) => members.map((row) => row[key]).sort((a, b) => a - b)[members.length >> 1];
      return { cluster: members[0].cluster, x: middle("x"), y: middle("y") };
    });
  for (const { cluster } of [...centres].sort((a, b) => a.cluster - b.cluster)) byId("single").add(new Option(named(cluster), cluster));

  function legend(by) {
    const box = byId("legend"), swatch = (colour, words) => {
      const dot = element("span", undefined, "dot");
      dot.style.background = colour;
      return [dot, element("span", words)];
    };
    if (by === "score") {
      const ramp = element("span", undefined, "ramp");
      ramp.style.background = "linear-gradient(to right, " + scale().join(", ") + ")";
      box.replaceChildren(element("span", "Score: " + number(lowest, 2) + " or less"), ramp, element("span", number(highest, 2) + " or more"));
    } else if (by === "taken") {
      box.replaceChildren(...swatch(style("--bar"), "kept"), ...swatch(style("--grey"), "not kept"));
    } else {
      box.replaceChildren(element("span", "Neighbouring clusters have different colours, which repeat: choose one cluster to set it apart."));
    }
  }

  function drawLabels(wide, high, unit, single) {
    const drawn = [];
    context.font = "600 13px system-ui, 'DejaVu Sans', sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (const centre of centres) {
      if (single && String(centre.cluster) !== single) continue;
      const text = briefly(centre.cluster), half = context.measureText(text).width / 2 + 3;
      const x = Math.min(wide - half, Math.max(half, wide / 2 + centre.x * unit)), y = high / 2 - centre.y * unit;
      if (drawn.some((other) => Math.abs(other.x - x) < other.half + half && Math.abs(other.y - y) < 18)) continue;
      drawn.push({ x, y, half });
      context.lineWidth = 4;
      context.lineJoin = "round";
      context.strokeStyle = style("--ground");
      context.strokeText(text, x, y);
      context.fillStyle = style("--text");
      context.fillText(text, x, y);
    }
  }

  function drawMap() {
    const ratio = window.devicePixelRatio || 1; // else the map is blurred on screens with dense pixels
    const wide = canvas.clientWidth;
    const unit = Math.min(wide / (2 * widest), HIGHEST / (2 * tallest));
    const high = Math.round(2 * tallest * unit);
    canvas.width = wide * ratio;
    canvas.height = high * ratio;
    canvas.style.height = high + "px";
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const size = Math.min(6, Math.max(2.5, 130 / Math.sqrt(placed.length)));
    const by = byId("colour").value, single = byId("single").value;
    legend(by);
    spots = placed.filter((row) => visible(row, byId("shown").value)).map((row) => {
      return { row, x: wide / 2 + row.x * unit, y: high / 2 - row.y * unit };
    });
    const ring = style("--ring"), ground = style("--ground");
    for (const spot of spots) {
      context.globalAlpha = !single || String(spot.row.cluster) === single ? 1 : 0.12;
      context.beginPath();
      context.arc(spot.x, spot.y, spot.row.by ? 1.2 * size : 0.8 * size, 0, 2 * Math.PI);
      context.fillStyle = colourOf(spot.row, by);
      context.fill();
      context.lineWidth = spot.row.by ? 1.2 : 0.3;
      context.strokeStyle = spot.row.by ? ring : ground;
      context.stroke();
    }
    context.globalAlpha = 1;
    if (byId("labels").checked) drawLabels(wide, high, unit, single);
    if (current) {
      context.beginPath();
      context.arc(current.x, current.y, 2 * size + 3, 0, 2 * Math.PI);
      context.lineWidth = 3;
      context.strokeStyle = style("--accent");
      context.stroke();
    }
  }

  function nearest(event) {
    const box = canvas.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    let best = null, least = 144; // the square of twelve pixels
    for (const spot of spots) {
      const apart = (spot.x - x) ** 2 + (spot.y - y) ** 2;
      if (apart <= least) { best = spot; least = apart; }
    }
    return best;
  }

  function show(spot) {
    const hover = byId("hover");
    hover.hidden = !spot;
    if (!spot) return;
    const row = spot.row, words = element("div");
    for (const [name, text] of snippet(row)) words.append(element("span", name, "label"), text + " ");
    hover.replaceChildren(element("strong", "Row " + row.id + ", score " + number(row.score, 3) + ", " + kept(row)));
    if (row.cluster !== null) hover.append(element("div", "Cluster " + named(row.cluster)));
    hover.append(words);
    hover.style.left = Math.min(spot.x + 12, Math.max(0, canvas.clientWidth - hover.offsetWidth - 4)) + "px";
    hover.style.top = spot.y + 12 + "px";
  }

  const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  // Go to the row that is nearest in a direction; rows far off to the side count as farther.
  function move([right, down]) {
    if (!spots.length) return;
    const start = current || { x: canvas.clientWidth / 2, y: canvas.clientHeight / 2 };
    const single = byId("single").value;
    let best = null, least = Infinity;
    for (const spot of spots) {
      if (single && String(spot.row.cluster) !== single) continue;
      const along = (spot.x - start.x) * right + (spot.y - start.y) * down;
      const across = Math.abs((spot.x - start.x) * down) + Math.abs((spot.y - start.y) * right);
      if (along > 0.5 && along + 3 * across < least) { best = spot; least = along + 3 * across; }
    }
    if (!best) return;
    current = best;
    drawMap();
    show(best);
    byId("spoken").textContent = byId("hover").textContent;
  }

  canvas.addEventListener("mousemove", (event) => show(nearest(event)));
  canvas.addEventListener("mouseleave", () => show(null));
  canvas.addEventListener("click", (event) => { const spot = nearest(event); if (spot) explain(spot.row); });
  canvas.addEventListener("blur", () => { current = null; show(null); drawMap(); });
  canvas.addEventListener("keydown", (event) => {
    if (MOVES[event.key]) { event.preventDefault(); move(MOVES[event.key]); }
    if ((event.key === "Enter" || event.key === " ") && current) { event.preventDefault(); explain(current.row); }
  });
  for (const id of ["colour", "shown", "single", "labels"]) byId(id).addEventListener("change", () => { current = null; drawMap(); });
  window.addEventListener("resize", () => { current = null; drawMap(); });
  dark.addEventListener("change", drawMap);
  drawMap();
}

// The page holds no time, so that equal runs write equal bytes; a browser knows that of the file. A server that does
// not tell it gives the present.
const written = new Date(document.lastModified);
if (Math.abs(Date.now() - written) > 5000) {
  byId("date").textContent = written.toLocaleDateString("en", { day: "numeric", month: "long", year: "numeric" });
  byId("date").dateTime = written.toISOString();
  byId("dated").hidden = false;
}
