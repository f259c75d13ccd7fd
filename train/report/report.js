// Charts that answer: values under the pointer, drag to zoom (double-click: back), log scale, smoothing.
// A page without scripts shows the same lines as they were drawn into it. In `cogtrain watch` the page renews itself.
"use strict";
const NS = "http://www.w3.org/2000/svg", PAD = { left: 58, right: 26, top: 12, bottom: 44 };
const shown = v => v === 0 ? "0" : Math.abs(v) < 1e-3 ? Number(v.toPrecision(3)).toExponential() : Math.abs(v) >= 1000
  ? Math.round(v).toLocaleString("en") : String(Number(v.toPrecision(3)));
const element = (name, attributes, text) => {
  const made = document.createElementNS(NS, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  return made;
};

function ticks(low, high, about) {
  if (!(high > low)) return [low];
  const rough = (high - low) / about, base = 10 ** Math.floor(Math.log10(rough));
  const step = base * [1, 2, 5, 10].find(factor => base * factor >= rough * 0.999), found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(Number((n * step).toPrecision(12)));
  return found.length ? found : [low];
}

// As `chart.smoothed`, an exponential average over a share of the run; `times` as long.
function smoothed(points, times) {
  const length = Math.max(1, times * Math.max(points.length * 0.04, Math.min(8, points.length / 4))), keep = 1 - 1 / length;
  let total = 0, weight = 0;
  return points.map(([x, y]) => {
    total = keep * total + y; weight = keep * weight + 1;
    return [x, total / weight];
  }).slice(Math.floor(Math.min(length, points.length / 2) / 4));
}

class Chart {
  constructor(figure) {
    this.figure = figure; this.log = false; this.times = 1; this.zoom = null;
    this.svg = figure.querySelector("svg"); this.take(figure);
    const tools = figure.querySelector(".tools");
    if (tools) {
      tools.hidden = false;
      tools.querySelector(".log").onchange = event => { this.log = event.target.checked; this.draw(); };
      const slider = tools.querySelector(".smoothing");
      if (slider) slider.oninput = event => { this.times = 2 ** event.target.value; this.draw(); };
      tools.querySelector(".back").onclick = () => { this.zoom = null; this.draw(); };
    }
    this.tip = figure.appendChild(document.createElement("div")); this.tip.className = "tip"; this.tip.hidden = true;
    this.svg.style.touchAction = "pan-y";
    this.svg.addEventListener("pointermove", event => this.move(event));
    this.svg.addEventListener("pointerleave", () => { if (this.from === undefined) this.leave(); });
    this.svg.addEventListener("pointerdown", event => { this.from = this.step(event); this.svg.setPointerCapture(event.pointerId); });
    this.svg.addEventListener("pointerup", event => this.up(event));
    this.svg.addEventListener("dblclick", () => { this.zoom = null; this.draw(); });
    new ResizeObserver(() => this.draw()).observe(figure);
  }
  take(figure) { this.given = JSON.parse(figure.querySelector("script").textContent); }
  lines() {
    const raw = this.given.find(line => line.style === "raw");
    return this.given.map(line => line.style === "smooth" && raw ? { ...line, points: smoothed(raw.points, this.times) } : line)
      .map(line => ({ ...line, points: line.points.filter(([x, y]) =>
        (!this.zoom || (x >= this.zoom[0] && x <= this.zoom[1])) && (!this.log || y > 0)) }))
      .filter(line => line.points.length);
  }
  draw() {
    const lines = this.lines(), width = this.svg.clientWidth || 600;
    if (!lines.length || !width) return;
    const height = this.figure.parentElement.className === "small" ? Math.min(230, width * 0.6) : Math.max(240, Math.min(340, width * 0.5));
    let low = Infinity, high = -Infinity;
    for (const line of lines) {
      let values = line.points.map(point => point[1]).sort((a, b) => a - b);
      if (line.trimmed && !this.zoom && values.length >= 50) values = values.slice(Math.floor(values.length / 100), values.length - Math.floor(values.length / 50));
      low = Math.min(low, values[0], ...(line.style === "plain" && !this.log ? [0] : [])); high = Math.max(high, values[values.length - 1]);
    }
    if (low === high) { low -= Math.abs(low || 1) * 0.1; high += Math.abs(high || 1) * 0.1; }
    const scale = this.log ? Math.log10 : y => y, unscale = this.log ? y => 10 ** y : y => y;
    const room = (scale(high) - scale(low)) * 0.04;
    let bottom = scale(low) - room, top = scale(high) + room;
    if (!this.log && low >= 0) bottom = Math.max(0, bottom);
    const xs = lines.flatMap(line => [line.points[0][0], line.points[line.points.length - 1][0]]);
    this.x0 = this.zoom ? this.zoom[0] : Math.min(...xs); this.x1 = this.zoom ? this.zoom[1] : Math.max(...xs);
    this.width = width; this.drawn = lines;
    const atX = this.atX = x => PAD.left + (x - this.x0) / (this.x1 - this.x0 || 1) * (width - PAD.left - PAD.right);
    const atY = this.atY = y => height - PAD.bottom - (Math.min(Math.max(scale(y), bottom), top) - bottom) / (top - bottom) * (height - PAD.top - PAD.bottom);
    const parts = [];
    for (const tick of ticks(bottom, top, 5)) {
      const y = atY(unscale(tick));
      parts.push(element("line", { class: "grid", x1: PAD.left, x2: width - PAD.right, y1: y, y2: y }));
      parts.push(element("text", { x: PAD.left - 8, y: y + 4, "text-anchor": "end" }, shown(unscale(tick))));
    }
    for (const tick of ticks(this.x0, this.x1, Math.max(3, width / 110))) if (Number.isInteger(tick))
      parts.push(element("text", { x: atX(tick), y: height - 25, "text-anchor": "middle" }, tick.toLocaleString("en")));
    parts.push(element("text", { x: (PAD.left + width - PAD.right) / 2, y: height - 6, "text-anchor": "middle" }, "step"));
    for (const line of lines) {
      parts.push(element("polyline", { class: line.style, points: line.points.map(([x, y]) => `${atX(x).toFixed(1)},${atY(y).toFixed(1)}`).join(" ") }));
      if (line.marks) for (const [x, y] of line.points) parts.push(element("circle", { class: line.style, cx: atX(x), cy: atY(y), r: 3.5 }));
    }
    this.cursor = element("line", { class: "cursor", y1: PAD.top, y2: height - PAD.bottom, visibility: "hidden" });
    this.band = element("rect", { class: "zoom", y: PAD.top, height: height - PAD.top - PAD.bottom, width: 0 });
    this.svg.classList.add("drawn");
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren(...parts, this.band, this.cursor);
    const back = this.figure.querySelector(".back");
    if (back) back.hidden = !this.zoom;
  }
  step(event) {
    const x = event.clientX - this.svg.getBoundingClientRect().left;
    const share = (x - PAD.left) / (this.width - PAD.left - PAD.right);
    return this.x0 + Math.min(1, Math.max(0, share)) * (this.x1 - this.x0);
  }
  move(event) {
    if (!this.drawn) return;
    const at = this.step(event);
    if (this.from !== undefined) {
      const [a, b] = [this.atX(Math.min(at, this.from)), this.atX(Math.max(at, this.from))];
      this.band.setAttribute("x", a); this.band.setAttribute("width", b - a);
    }
    const nearest = points => points.reduce((best, point) => Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best);
    const found = nearest(this.drawn[0].points)[0];
    const rows = this.drawn.map(line => [line, nearest(line.points)]);
    this.tip.replaceChildren(document.createElement("b"), ...rows.map(([line, point]) => {
      const row = document.createElement("span");
      row.className = line.style;
      row.append(document.createElement("i"), `${line.name}: ${shown(point[1])}` + (line.marks && point[0] !== found ? ` (step ${point[0]})` : ""));
      return row;
    }));
    this.tip.firstChild.textContent = `step ${found.toLocaleString("en")}`;
    const x = this.atX(found), box = this.figure.getBoundingClientRect();
    this.cursor.setAttribute("x1", x); this.cursor.setAttribute("x2", x); this.cursor.setAttribute("visibility", "visible");
    this.tip.hidden = false;
    const right = this.svg.getBoundingClientRect().left - box.left + x;
    this.tip.style.left = `${right + this.tip.offsetWidth + 24 > box.width ? Math.max(4, right - this.tip.offsetWidth - 12) : right + 12}px`;
    this.tip.style.top = `${this.svg.getBoundingClientRect().top - box.top + 16}px`;
  }
  leave() { this.tip.hidden = true; if (this.cursor) this.cursor.setAttribute("visibility", "hidden"); }
  up(event) {
    const to = this.step(event), [a, b] = [Math.min(to, this.from), Math.max(to, this.from)];
    this.from = undefined;
    if (this.atX(b) - this.atX(a) > 8) { this.zoom = [a, b]; this.leave(); this.draw(); }
    else this.band.setAttribute("width", 0);
  }
}

const sections = page => [...page.querySelectorAll("[data-part]")];
const before = new Map(sections(document).map(part => [part.dataset.part, part.innerHTML]));
const charts = new Map();
const begin = () => document.querySelectorAll("figure.plot").forEach(figure => { if (!charts.has(figure.id)) charts.set(figure.id, new Chart(figure)); });
begin();

// A video's controls would cover half of a small one: they come when it is pointed at or tapped.
for (const [kind, wanted] of [["pointerover", true], ["pointerout", false]])
  document.addEventListener(kind, event => { if (event.target.matches("video")) event.target.controls = wanted; });
const bare = () => document.querySelectorAll(".row video").forEach(video => { video.controls = video.matches(":hover"); });
bare();

// A row of videos plays together.
document.addEventListener("click", event => {
  if (!event.target.matches(".together")) return;
  const videos = [...event.target.closest(".sample").querySelectorAll("video")], stop = videos.some(video => !video.paused);
  for (const video of videos) if (stop) video.pause(); else { video.currentTime = 0; video.play(); }
  event.target.textContent = stop ? "play all" : "pause all";
});

// `cogtrain watch`: asks the run to save and stop.
document.addEventListener("click", async event => {
  if (!event.target.matches(".stop")) return;
  const button = event.target;
  button.disabled = true;
  const answer = await fetch("stop", { method: "POST", headers: { "X-Token": button.dataset.token } });
  button.parentElement.textContent = answer.ok ? "asked to save and stop" : await answer.text();
});

// Live: what has changed of the page is taken over; charts keep their zoom, videos that play go on.
const live = Number(document.body.dataset.live || 0);
async function renew() {
  try {
    const page = new DOMParser().parseFromString(await (await fetch(location.href, { cache: "no-store" })).text(), "text/html");
    for (const part of sections(page)) {
      const name = part.dataset.part, here = document.querySelector(`[data-part="${name}"]`);
      if (!here) { location.reload(); return; }
      if (before.get(name) === part.innerHTML) continue;
      before.set(name, part.innerHTML);
      const figures = [...part.querySelectorAll("figure.plot")];
      if (figures.length && figures.every(figure => charts.has(figure.id)))
        for (const figure of figures) { const chart = charts.get(figure.id); chart.take(figure); if (chart.from === undefined) chart.draw(); }
      else { here.replaceChildren(...part.childNodes); figures.forEach(figure => charts.delete(figure.id)); begin(); bare(); }
    }
    document.body.classList.remove("lost");
  } catch { document.body.classList.add("lost"); }
  setTimeout(renew, live * 1000);
}
if (live) setTimeout(renew, live * 1000);
