"use strict";
// Everything that comes from rows is set as text, never as HTML: it may hold markup.
const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.rows;
const byId = (id) => document.getElementById(id);
const PAGE = 50; // rows of the search shown at a time

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const number = (value, digits) => (value === null ? "none" : value.toFixed(digits));
const kept = (row) => (row.by ? "kept by " + row.by : "not kept");
const visible = (row, which) => which === "all" || (which === "kept") === Boolean(row.by);

// tables ------------------------------------------------------------------------------------------------------------

function tableOf(shown) {
  const table = element("table");
  const head = table.createTHead().insertRow();
  for (const name of ["row", "score", "rank in cluster", data.unit, "kept", "text"]) head.append(element("th", name));
  const body = table.createTBody();
  for (const row of shown) {
    const line = body.insertRow();
    line.className = "row";
    line.tabIndex = 0;
    const place = row.cluster === null ? "" : row.crank + " in " + row.cluster;
    line.append(element("td", String(row.id)), element("td", number(row.score, 3), "number"), element("td", place, "number"));
    line.append(element("td", row.length.toLocaleString("en"), "number"), element("td", row.by || "no"));
    line.append(element("td", row.text, "text"));
    line.addEventListener("click", () => explain(row, line));
    line.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault(); // the space bar would scroll
      explain(row, line);
    });
  }
  return table;
}

function chooser(select, options, show) {
  for (const [value, label] of options) select.add(new Option(label, value));
  select.addEventListener("change", () => show(select.value));
  if (options.length) show(select.value);
}

chooser(byId("decile"), data.deciles.map((d, i) => [i, d.name]), (i) => {
  byId("deciles").replaceChildren(tableOf(data.deciles[i].rows.map((r) => rows[r])));
});

chooser(byId("cluster"), data.clusters.map((c, i) => [i, c.label]), (i) => {
  const chosen = data.clusters[i];
  const parts = [["Best", chosen.best], ["Worst", chosen.worst]];
  byId("ends").replaceChildren(...parts.flatMap(([name, list]) => [element("h3", name), tableOf(list.map((r) => rows[r]))]));
});

let limit = PAGE;
const textOf = (row) => row.more || row.text;
// A row that is named by text is found by that text; numbers only as entire words, or 7 would find 17 and 70.
const haystacks = rows.map((row) => ((typeof row.id === "string" ? row.id + " " : "") + textOf(row)).toLowerCase());

function search() {
  const named = []; // "row 17" and "cluster 3" name one row or cluster, and are not words to look for
  const rest = byId("search").value.toLowerCase().replace(/\b(row|cluster)[\s:]+(\d+)(?!\S)/g, (_, what, name) => { named.push([what, name]); return " "; });
  const words = rest.split(/\s+/).filter(Boolean);
  const which = byId("which").value;
  const found = rows.filter((row, i) => visible(row, which)
    && named.every(([what, name]) => String(what === "row" ? row.id : row.cluster) === name)
    && words.every((word) => haystacks[i].includes(word) || String(row.id) === word));
  const part = data.searched ? "; of long rows " + data.searched.toLocaleString("en") + " characters are searched" : "";
  byId("found").textContent = found.length.toLocaleString("en") + " of " + rows.length.toLocaleString("en") + " rows on this page" + part;
  byId("rows").replaceChildren(tableOf(found.slice(0, limit)));
  byId("more").hidden = found.length <= limit;
}

for (const id of ["search", "which"]) byId(id).addEventListener("input", () => { limit = PAGE; search(); });
byId("more").addEventListener("click", () => { limit += PAGE; search(); });
search();

// why a row was kept --------------------------------------------------------------------------------------------------

function explain(row, origin) {
  const box = byId("why"), from = window.scrollY;
  const told = row.told;
  const head = "Row " + row.id + ", score " + number(row.score, 3) + ", percentile " + number(row.percentile, 1);
  box.replaceChildren(element("p", head + ", " + row.length.toLocaleString("en") + " " + data.unit + (row.cut ? ", cut before its end" : "") + "."));
  if (!told) {
    box.append(element("p", kept(row) + ". " + textOf(row)));
    box.append(element("p", "This page explains some rows only. For this one, in Python: explain(scored, selected, " + JSON.stringify(row.id) + ").", "note"));
  } else {
    box.append(element("p", told.why));
    for (const [name, text] of told.texts) box.append(element("strong", name), element("pre", text));
    const near = (n) => "row " + n.row + " (similarity " + n.similarity.toFixed(3) + ", score " + number(n.score, 3) + ", " + (n.selected ? "kept" : "not kept") + ")";
    if (told.neighbours.length) box.append(element("p", "Nearest in its cluster: " + told.neighbours.map(near).join("; ")));
    if (told.nearest) box.append(element("p", "Nearest kept row: " + near(told.nearest)));
  }
  const back = element("button", "Back to where you were");
  back.addEventListener("click", () => origin.scrollIntoView({ block: "center" }));
  box.prepend(back);
  box.scrollIntoView({ block: box.offsetHeight < window.innerHeight ? "nearest" : "start" });
  back.hidden = Math.abs(window.scrollY - from) < 100;
}

// the map ---------------------------------------------------------------------------------------------------------

const canvas = byId("map");
let spots = []; // the rows that are shown, with their pixels
if (canvas) {
  // Kept rows last, so that they are drawn on top.
  const placed = rows.filter((row) => row.x !== null).sort((a, b) => Boolean(a.by) - Boolean(b.by));
  const scores = placed.map((row) => row.score).sort((a, b) => a - b);
  // Colours span the middle 96 % of the scores: a few outliers would make all other rows look alike.
  const lowest = scores[Math.floor(0.02 * (scores.length - 1))], highest = scores[Math.ceil(0.98 * (scores.length - 1))];
  const context = canvas.getContext("2d");
  // 4 % of margin, in units of the map, whose wider axis goes from -1 to 1.
  const widest = 1.04 * Math.max(0.1, ...placed.map((row) => Math.abs(row.x)));
  const tallest = 1.04 * Math.max(0.1, ...placed.map((row) => Math.abs(row.y)));
  const HIGHEST = 620; // pixels: the map and the words above it fit a screen

  function colourOf(row, by) {
    if (by === "cluster") return data.palette[row.colour];
    if (by === "taken") return row.by ? "#0072B2" : "#B8B8B8";
    const share = Math.min(1, Math.max(0, (row.score - lowest) / (highest - lowest || 1)));
    return "hsl(" + (45 + 175 * share) + " 75% " + (88 - 55 * share) + "%)"; // from light to dark too, for readers who do not see the hue
  }

  function drawMap() {
    const scale = window.devicePixelRatio || 1; // else the map is blurred on screens with dense pixels
    const wide = canvas.clientWidth;
    const unit = Math.min(wide / (2 * widest), HIGHEST / (2 * tallest));
    const high = Math.round(2 * tallest * unit);
    canvas.width = wide * scale;
    canvas.height = high * scale;
    canvas.style.height = high + "px";
    context.setTransform(scale, 0, 0, scale, 0, 0);
    const size = Math.min(6, Math.max(2.5, 130 / Math.sqrt(placed.length)));
    const by = byId("colour").value;
    byId("legend").textContent = { cluster: "", score: "Dark: high scores; light: low.", taken: "Blue: kept; grey: not." }[by];
    spots = placed.filter((row) => visible(row, byId("shown").value)).map((row) => {
      return { row, x: wide / 2 + row.x * unit, y: high / 2 - row.y * unit };
    });
    for (const spot of spots) {
      context.beginPath();
      context.arc(spot.x, spot.y, spot.row.by ? 1.2 * size : 0.8 * size, 0, 2 * Math.PI);
      context.fillStyle = colourOf(spot.row, by);
      context.fill();
      context.lineWidth = spot.row.by ? 1.2 : 0.3;
      context.strokeStyle = spot.row.by ? "#222" : "#fff";
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

  canvas.addEventListener("mousemove", (event) => {
    const spot = nearest(event), hover = byId("hover");
    hover.hidden = !spot;
    if (!spot) return;
    const row = spot.row;
    hover.replaceChildren(element("strong", "Row " + row.id + ", score " + number(row.score, 3) + ", " + kept(row)));
    hover.append(element("div", (row.cluster === null ? "" : "Cluster " + row.cluster + ". ") + row.text));
    hover.style.left = Math.min(spot.x + 12, Math.max(0, canvas.clientWidth - hover.offsetWidth - 4)) + "px";
    hover.style.top = spot.y + 12 + "px";
  });
  canvas.addEventListener("mouseleave", () => { byId("hover").hidden = true; });
  canvas.addEventListener("click", (event) => { const spot = nearest(event); if (spot) explain(spot.row, canvas); });
  for (const id of ["colour", "shown"]) byId(id).addEventListener("change", drawMap);
  window.addEventListener("resize", drawMap);
  drawMap();
}
