"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dashes = ["solid", "dash", "dot"];
const rows = new Map([...document.querySelectorAll("tr.job")].map((row) => [Number(row.dataset.job), row]));
const kept = new Set();
const drawn = new Map(); // by chart, the job of each of its lines
const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function layout(more) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
    font: { color: color("--fg"), family: "system-ui, sans-serif", size: 13 }, margin: { l: 64, r: 16, t: 36, b: 48 },
    hoverlabel: { align: "left", bgcolor: color("--panel"), bordercolor: color("--line"), font: { color: color("--fg") } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--quiet"), activecolor: color("--fg") },
    ...more,
  };
}

function axis(title, more) {
  return { title: { text: title }, gridcolor: color("--line"), zerolinecolor: color("--line"), linecolor: color("--line"), automargin: true, ...more };
}

const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const digits = (value) => (value === null ? "none" : Number(value.toPrecision(4)).toString());
const short = (text, most) => (text.length > most ? text.slice(0, Math.ceil(most / 2) - 1) + "…" + text.slice(-Math.floor(most / 2)) : text);

function told(job) {
  const given = data.axes.map((one) => `${escaped(one.name)}=${escaped(short(job.given[one.key], 60))}`);
  const value = data.metric ? `${escaped(data.metric.name)} at the end: ${digits(job.value)}` : "";
  return [`<b>job ${escaped(job.label)}</b>`, ...given, value].join("<br>");
}

// ---------------------------------------------------------------- curves

const hasCurve = (job, metric) => (job.curves[metric]?.value ?? []).filter((value) => value !== null).length > 1;

function drawCurves() {
  const metric = document.getElementById("metric").value;
  const isLog = document.getElementById("log").checked;
  drawChart("over-steps", metric, "step", "optimizer steps", isLog);
  drawChart("over-time", metric, "seconds", "seconds", isLog);
}

function drawChart(id, metric, by, title, isLog) {
  // the best is drawn last, above the others
  const jobs = data.jobs.filter((job) => hasCurve(job, metric) && job.curves[metric][by].some((x) => x !== null)).reverse();
  const traces = jobs.map((job) => ({
    x: job.curves[metric][by], y: job.curves[metric].value, type: "scatter",
    mode: job.curves[metric].value.length > 40 ? "lines" : "lines+markers", marker: { size: 5 },
    line: { color: job.color, width: 2, dash: dashes[job.sweep % dashes.length] },
    hovertemplate: `${told(job)}<br>%{x:.6~g} ${title}: <b>%{y:.5~g}</b><extra></extra>`,
  }));
  const none = jobs.length ? [] : [{ text: `no ${by === "seconds" ? "times" : "steps"} were logged`, showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }];
  draw(id, jobs, traces, layout({
    title: { text: `${escaped(metric)} over ${by === "seconds" ? "time" : "steps"}`, font: { size: 14 }, x: 0, xref: "paper", xanchor: "left" }, annotations: none,
    xaxis: axis(title, { rangemode: "tozero" }), yaxis: axis(escaped(metric), { type: isLog ? "log" : "linear" }),
  }));
}

function draw(id, jobs, traces, shape) {
  const element = document.getElementById(id);
  const isNew = !drawn.has(id);
  drawn.set(id, jobs.map((job) => job.id));
  Plotly.react(element, traces, shape, config);
  if (isNew) {
    element.on("plotly_hover", (event) => stress(drawn.get(id)[event.points[0].curveNumber], id));
    element.on("plotly_unhover", () => stress(null, id));
  }
  stress(null);
}

// ---------------------------------------------------------------- parallel coordinates

const number = (text) => Number(text.replace(/_/g, ""));

function scale(values, isLog) {
  const at = isLog ? Math.log10 : (value) => value;
  const [low, high] = [Math.min(...values.map(at)), Math.max(...values.map(at))];
  return (value) => (high > low ? (at(value) - low) / (high - low) : 0.5);
}

function ticks(values) {
  const distinct = [...new Set(values)].sort((a, b) => a - b);
  if (distinct.length <= 6) return distinct;
  return [0, 1, 2, 3, 4].map((part) => distinct[Math.round((part / 4) * (distinct.length - 1))]);
}

function coordinate(one, jobs) {
  if (one.choices) {
    const place = (text) => (one.choices.length > 1 ? one.choices.indexOf(text) / (one.choices.length - 1) : 0.5);
    return { name: one.name, at: (job) => place(job.given[one.key]), ticks: one.choices.map((text) => [place(text), text || "(not given)"]) };
  }
  const values = jobs.map((job) => number(job.given[one.key]));
  const place = scale(values, one.isLog);
  return { name: one.name + (one.isLog ? " (log)" : ""), at: (job) => place(number(job.given[one.key])), ticks: ticks(values).map((value) => [place(value), digits(value)]) };
}

function drawCoordinates() {
  const jobs = data.jobs.filter((job) => job.value !== null).reverse();
  if (!document.getElementById("coordinates") || !jobs.length) return;
  const values = jobs.map((job) => job.value);
  const place = scale(values, false);
  const axes = data.axes.map((one) => coordinate(one, jobs));
  axes.push({ name: data.metric.name, at: (job) => place(job.value), ticks: ticks(values).map((value) => [place(value), digits(value)]) });
  const across = axes.map((_, index) => index);
  const traces = jobs.map((job) => ({
    x: across, y: axes.map((one) => one.at(job)), type: "scatter", mode: "lines+markers", marker: { size: 6 },
    line: { color: job.color, width: 2, dash: dashes[job.sweep % dashes.length] }, hovertemplate: `${told(job)}<extra></extra>`,
  }));
  const width = document.getElementById("coordinates").clientWidth / axes.length;
  const most = Math.max(8, Math.floor(width / 8));
  const line = (index) => ({ type: "line", x0: index, x1: index, y0: 0, y1: 1, line: { color: color("--quiet"), width: 1 }, layer: "below" });
  const label = (index, [y, text]) => ({ x: index, y, text: escaped(short(text, most)), hovertext: escaped(text), xanchor: index === axes.length - 1 ? "right" : "left", xshift: index === axes.length - 1 ? -8 : 8, yshift: 9, showarrow: false, font: { size: 12 }, bgcolor: color("--bg"), opacity: 0.85, borderpad: 1 });
  draw("coordinates", jobs, traces, layout({
    shapes: across.map(line), annotations: axes.flatMap((one, index) => distinctTicks(one.ticks).map((tick) => label(index, tick))),
    xaxis: { tickvals: across, ticktext: axes.map((one) => `<b>${escaped(short(one.name, most + 4))}</b>`), side: "top", range: [-0.12, axes.length - 0.88], showgrid: false, zeroline: false, fixedrange: true },
    yaxis: { visible: false, range: [-0.06, 1.1], fixedrange: true }, margin: { l: 24, r: 24, t: 40, b: 12 },
  }));
}

// both ends, and of those between the ones that do not lie over another
function distinctTicks(all) {
  const sorted = [...all].sort((a, b) => a[0] - b[0]);
  const shown = [sorted[0], ...(sorted.length > 1 ? [sorted.at(-1)] : [])];
  for (const tick of sorted.slice(1, -1)) {
    if (shown.every((other) => Math.abs(other[0] - tick[0]) > 0.06)) shown.push(tick);
  }
  return shown;
}

// ---------------------------------------------------------------- one job among all

function stress(job, source) {
  const chosen = new Set(kept);
  if (job !== null) chosen.add(job);
  for (const [id, row] of rows) {
    row.classList.toggle("kept", kept.has(id));
    row.classList.toggle("pointed", id === job);
  }
  for (const [id, jobs] of drawn) {
    // the chart that is pointed at stays as it is: drawn anew it would lose the pointer
    if (!jobs.length || (id === source && !kept.size)) continue;
    const loud = jobs.map((one) => !chosen.size || chosen.has(one));
    Plotly.restyle(id, { opacity: loud.map((is) => (is ? 1 : 0.12)), "line.width": jobs.map((one) => (chosen.has(one) ? 3.5 : 2)) });
  }
}

for (const [id, row] of rows) {
  row.addEventListener("mouseenter", () => stress(id));
  row.addEventListener("mouseleave", () => stress(null));
  row.addEventListener("click", () => {
    if (!kept.delete(id)) kept.add(id);
    stress(id);
  });
}

// ---------------------------------------------------------------- the table

function sortBy(header, column) {
  const isUp = header.getAttribute("aria-sort") !== "ascending";
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", isUp ? "ascending" : "descending");
  const cell = (row) => row.children[column].dataset.value ?? row.children[column].textContent.trim();
  const compare = (a, b) => (a !== "" && b !== "" && !isNaN(a) && !isNaN(b) ? a - b : a.localeCompare(b));
  const body = header.closest("table").tBodies[0];
  // cells without a value stay at the end
  const sorted = [...body.rows].sort((a, b) => (cell(a) === "") - (cell(b) === "") || (isUp ? 1 : -1) * compare(cell(a), cell(b)));
  body.append(...sorted);
}

for (const header of document.querySelectorAll(".sortable th")) {
  const column = [...header.parentNode.children].indexOf(header);
  header.addEventListener("click", () => sortBy(header, column));
}

// ---------------------------------------------------------------- all of it

function drawAll() {
  if (data.metrics.length) drawCurves();
  drawCoordinates();
}

const choose = document.getElementById("metric");
for (const name of data.metrics) choose.add(new Option(name, name));
for (const id of ["metric", "log"]) document.getElementById(id).addEventListener("change", drawCurves);
if (!data.metrics.length) {
  for (const element of document.querySelectorAll("#curves .controls, #curves .pair")) element.hidden = true;
  document.getElementById("no-curves").hidden = false;
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawAll();
