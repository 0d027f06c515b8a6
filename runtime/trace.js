"use strict";
// The page's data: what trace_html.py put beside this script.
const data = JSON.parse(document.getElementById("data").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
for (const text of data.texts) {
  text.experts = new Uint16Array(bytes(text.experts).buffer); // [layers, tokens, k]
  text.weights = bytes(text.weights); // of a token's weights the share, 0 to 255
}
const $ = (name) => document.getElementById(name);
let layer = 0, rank = 0, chosen = null, marked = null, numbers = false;

const hue = (expert) => (expert * 137.508) % 360; // the golden angle keeps neighbours apart
const colour = (expert, weight) => `hsl(${hue(expert)} 72% ${86 - 22 * weight}%)`;
const at = (text, token, place) => (layer * text.pieces.length + token) * data.k + place;
const percent = (value) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)}%`;

function visible(piece) {
  if (piece === "") return "▯"; // a part of a character that a later token completes, or a special token
  return piece.replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t");
}

function paint() {
  data.texts.forEach((text, index) => {
    const box = $(`tokens-${index}`);
    if (!box.children.length) fill(box, text, index);
    [...box.children].forEach((span, token) => {
      const place = at(text, token, rank), expert = text.experts[place];
      const taken = chosen === null || places(text, token).some((p) => text.experts[p] === chosen);
      span.style.background = colour(expert, text.weights[place] / 255);
      span.classList.toggle("dim", !taken);
      span.classList.toggle("on", marked !== null && marked[0] === index && marked[1] === token);
      span.firstChild.textContent = numbers ? expert : "";
    });
  });
  legend();
  detail();
}

const places = (text, token) => Array.from({ length: data.k }, (_, place) => at(text, token, place));

function fill(box, text, index) {
  const all = document.createDocumentFragment();
  text.pieces.forEach((piece, token) => {
    const span = document.createElement("span");
    span.append(document.createElement("sub"), visible(piece)); // in front: a piece may end its line
    span.dataset.place = `${index},${token}`;
    all.append(span);
  });
  box.append(all);
}

function legend() {
  const counts = new Map();
  for (const text of data.texts)
    for (let token = 0; token < text.pieces.length; token++) {
      const expert = text.experts[at(text, token, rank)];
      counts.set(expert, (counts.get(expert) || 0) + 1);
    }
  const total = data.texts.reduce((sum, text) => sum + text.pieces.length, 0);
  const order = [...counts].sort((a, b) => b[1] - a[1]);
  if (chosen !== null && !counts.has(chosen)) order.unshift([chosen, 0]);
  const focused = document.activeElement && document.activeElement.dataset.expert;
  $("experts").replaceChildren(...order.slice(0, 48).map(([expert, count]) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.textContent = `${expert} · ${percent(count / total)}`;
    button.style.background = colour(expert, 0.5);
    button.dataset.expert = expert;
    button.setAttribute("aria-pressed", String(expert === chosen));
    button.onclick = () => { chosen = chosen === expert ? null : expert; paint(); };
    item.append(button);
    return item;
  }));
  const again = focused && $("experts").querySelector(`[data-expert="${focused}"]`);
  if (again) again.focus();
}

function detail() {
  if (marked === null) {
    $("detail").textContent = "Tap a token to see which experts it took here, and an expert to see its tokens.";
    return;
  }
  const [index, token] = marked, text = data.texts[index];
  const sum = places(text, token).reduce((total, p) => total + text.weights[p], 0) || 1;
  const taken = places(text, token).map((p) => `${text.experts[p]} (${percent(text.weights[p] / sum)})`).join(", ");
  const shown = JSON.stringify(text.pieces[token]);
  $("detail").textContent = `Token ${token} ${shown}, id ${text.ids[token]}, layer ${data.layers[layer]}: experts ${taken}`;
}

function readout(event) {
  const map = event.target.closest("svg[data-map]");
  if (!map) return;
  const box = map.getBoundingClientRect();
  const expert = Math.min(data.experts - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * data.experts)));
  const row = Math.min(data.layers.length - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * data.layers.length)));
  const shares = data.texts.map((text) => text.counts[row][expert] / text.counts[row].reduce((a, b) => a + b, 0));
  const told = shares.map((share, index) => `${data.texts.length > 1 ? `text ${index + 1}: ` : ""}${percent(share)} ` +
    `of the assignments, ${(share * data.experts).toFixed(2)} times an even load`).join("; ");
  $("readout").textContent = `Layer ${data.layers[row]}, expert ${expert}: ${told}`;
}

function look(canvas) {
  const [index, place] = canvas.dataset.look.split(",").map(Number);
  return [data.texts[index], data.texts[index].looks[place]];
}

function draw(canvas) {
  const [, found] = look(canvas), count = canvas.width;
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--hot").split(",").map(Number);
  const values = bytes(found.roots), context = canvas.getContext("2d"), image = context.createImageData(count, count);
  for (let at = 0; at < count * count; at++) image.data.set([...ink, values[at]], 4 * at);
  context.putImageData(image, 0, 0);
}

function looked(event) {
  const canvas = event.target.closest("canvas[data-look]");
  if (!canvas) return;
  const [text, found] = look(canvas), box = canvas.getBoundingClientRect(), count = canvas.width;
  const cell = (offset, size) => Math.min(count - 1, Math.max(0, Math.floor(offset / size * count)));
  const row = cell(event.clientY - box.top, box.height), column = cell(event.clientX - box.left, box.width);
  const weight = (bytes(found.roots)[row * count + column] / 255) ** 2;
  const shown = (token) => `${token} ${JSON.stringify(text.pieces[token])}`;
  $("look").textContent = `Layer ${found.layer}, head ${found.head}: token ${shown(row)} looks at ${shown(column)} with ` +
    percent(weight);
}

function go(step) {
  $("layer").value = String(Math.min(data.layers.length - 1, Math.max(0, layer + step)));
  layer = Number($("layer").value);
  paint();
}

$("layer").onchange = (event) => { layer = Number(event.target.value); paint(); };
$("rank").onchange = (event) => { rank = Number(event.target.value); paint(); };
$("numbers").onchange = (event) => { numbers = event.target.checked; paint(); };
$("earlier").onclick = () => go(-1);
$("later").onclick = () => go(1);
for (const kind of ["mousemove", "click"]) {
  document.addEventListener(kind, readout);
  document.addEventListener(kind, looked);
}
document.querySelectorAll("canvas[data-look]").forEach(draw);
document.addEventListener("click", (event) => {
  const span = event.target.closest("span[data-place]");
  if (span) { marked = span.dataset.place.split(",").map(Number); paint(); }
});
paint();
