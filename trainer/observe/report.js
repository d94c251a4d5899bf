// Draws the report's curves anew when the reader hovers, zooms, filters or changes the x axis.
"use strict";
(() => {
  const AXES = { images: "images seen", steps: "steps", hours: "hours since the start", joules: "joules of training" };
  const POLL_MS = 3000, DRAG_PX = 5;
  const tools = document.getElementById("tools");
  let data = JSON.parse(document.getElementById("curves").textContent);
  const view = { axis: "images", range: null, at: null, drag: null, attempts: new Set(), runs: new Set() };
  const charts = [...document.querySelectorAll("figure[data-panel]")].map(prepare);
  let frame = 0;

  function make(name, attributes = {}, ...content) {
    const known = ["svg", "line", "text", "polyline", "polygon", "circle", "rect", "g"];
    const element = known.includes(name)
      ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...content);
    return element;
  }

  function prepare(figure) {
    const svg = figure.querySelector("svg");
    const chart = { figure, svg, id: figure.dataset.panel, width: svg.viewBox.baseVal.width };
    chart.readout = make("output", { class: "readout", for: chart.id });
    figure.querySelector("figcaption").append(chart.readout);
    svg.setAttribute("tabindex", "0");
    svg.setAttribute("role", "slider");
    svg.addEventListener("pointermove", (event) => hover(chart, event));
    svg.addEventListener("pointerdown", (event) => { view.drag = { chart, from: event.clientX, to: event.clientX }; });
    svg.addEventListener("pointerleave", () => { if (!view.drag) moveTo(null); });
    svg.addEventListener("dblclick", () => zoom(null));
    svg.addEventListener("keydown", press);
    return chart;
  }

  // --- numbers -------------------------------------------------------------------------------

  const plain = (value) => String(Number(value.toPrecision(6)));
  const whole = (value) => value.toLocaleString("en-US", Number.isInteger(value) ? {} : { maximumSignificantDigits: 5 });

  function tickText(value) {
    for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= unit) return Number((value / unit).toPrecision(4)) + letter;
    return String(Number(value.toPrecision(3)));
  }

  function ticks(low, high, most) {
    const power = 10 ** Math.floor(Math.log10((high - low) / most));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => (high - low) / s <= most) || 10 * power;
    const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
    return Array.from({ length: last - first + 1 }, (_, idx) => (first + idx) * step);
  }

  function span(values) {
    let low = Infinity, high = -Infinity;
    for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
    if (high - low > 1e-6 * Math.max(Math.abs(high), Math.abs(low))) return [low, high];
    const pad = Math.abs(high) / 2 || 0.5;
    return [low - pad, high + pad];
  }

  function smooth(points, num) {
    return points.map((point, idx) => {
      const near = points.slice(Math.max(0, idx - num + 1), idx + 1);
      return { ...point, y: near.reduce((sum, p) => sum + p.y, 0) / near.length };
    });
  }

  // --- what is shown -------------------------------------------------------------------------

  const shownRuns = () => data.runs.map((run, idx) => ({ run, idx })).filter(({ idx }) => !view.runs.has(idx));

  function pointsOf(run, of, key) {
    const curves = run[of], values = curves.values[key], xs = curves.axes[view.axis];
    if (!values) return [];
    const found = [];
    for (let idx = 0; idx < xs.length; idx++) {
      const x = xs[idx], y = values.mean[idx];
      if (x === null || y === null || view.attempts.has(curves.attempts[idx])) continue;
      if (view.range && (x < view.range[0] || x > view.range[1])) continue;
      found.push({ x, y, idx, low: values.low ? values.low[idx] : y, high: values.high ? values.high[idx] : y });
    }
    return found;
  }

  function pieces(points) {
    const found = [];
    points.forEach((point, at) => {
      if (at && point.idx === points[at - 1].idx + 1) found[found.length - 1].push(point);
      else found.push([point]);
    });
    return found;
  }

  // Where all charts begin and end, so that they stay linked.
  function xSpan() {
    if (view.range) return view.range;
    const xs = shownRuns().flatMap(({ run }) => ["training", "evaluation"].flatMap((of) =>
      run[of].axes[view.axis].filter((x, idx) => x !== null && !view.attempts.has(run[of].attempts[idx]))));
    return xs.length ? span(xs) : [0, 1];
  }

  function nearest(points, x) {
    let best = null;
    for (const point of points) if (!best || Math.abs(point.x - x) < Math.abs(best.x - x)) best = point;
    return best;
  }

  // --- drawing -------------------------------------------------------------------------------

  function draw(chart) {
    const panel = data.panels.find((one) => one.id === chart.id), { left, right, top, bottom, height } = data.frame;
    const ends = { left, right: chart.width - right, top, bottom: height - bottom };
    chart.lines = shownRuns().flatMap(({ run, idx }) => panel.keys.map((key, nth) => ({
      run, colour: data.runs.length > 1 ? ` run${idx % 8}` : "", behind: nth > 0,
      points: pointsOf(run, panel.of, key), whole: run[panel.of].axes[view.axis].length })));
    const [x0, x1] = xSpan();
    const all = chart.lines.flatMap((line) => line.points.flatMap((p) => [p.low, p.high]));
    const [y0, y1] = span(panel.from_zero || !all.length ? [...all, 0] : all), marks = ticks(y0, y1, 5);
    const low = marks[0], high = marks[marks.length - 1];
    chart.x = { x0, x1, ends, px: (x) => ends.left + (x - x0) / (x1 - x0) * (ends.right - ends.left) };
    chart.y = (y) => ends.bottom - (y - low) / (high - low) * (ends.bottom - ends.top);
    const at = (p) => `${chart.x.px(p.x).toFixed(1)},${chart.y(p.y).toFixed(1)}`;
    const parts = [];
    for (const value of marks) {
      const y = chart.y(value).toFixed(1);
      parts.push(make("line", { x1: left, x2: ends.right, y1: y, y2: y, class: "grid" }));
      parts.push(make("text", { x: left - 8, y: Number(y) + 4, "text-anchor": "end" }, tickText(value)));
    }
    for (const value of ticks(x0, x1, 7).filter((x) => x >= x0 && x <= x1))
      parts.push(make("text", { x: chart.x.px(value).toFixed(1), y: ends.bottom + 17, "text-anchor": "middle" }, tickText(value)));
    parts.push(make("text", { x: (left + ends.right) / 2, y: height - 5, "text-anchor": "middle" }, AXES[view.axis]));
    for (const { points, colour, behind, whole: length } of chart.lines)
      for (const piece of pieces(points)) parts.push(...drawPiece(piece, { at, colour, behind, panel, length, y: chart.y, x: chart.x.px }));
    chart.cursor = make("g", { class: "cursor" });
    chart.svg.replaceChildren(...parts, chart.cursor);
    for (const [name, value] of Object.entries({ min: x0, max: x1 })) chart.svg.setAttribute(`aria-value${name}`, value);
  }

  function drawPiece(piece, { at, colour, behind, panel, length, x, y }) {
    const parts = [], join = (points) => points.map(at).join(" ");
    if (piece.some((p) => p.high > p.low)) {
      const edge = [...piece.map((p) => [p.x, p.high]), ...[...piece].reverse().map((p) => [p.x, p.low])];
      parts.push(make("polygon", { class: `band${colour}`, points: edge.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ") }));
    }
    if (piece.length === 1 && !behind) parts.push(make("circle", { class: `dot${colour}`, cx: x(piece[0].x), cy: y(piece[0].y), r: 3 }));
    if (behind || panel.noisy) parts.push(make("polyline", { class: `faint${colour}`, points: join(piece) }));
    const line = panel.noisy ? smooth(piece, Math.max(1, Math.floor(length / 40))) : piece;
    if (!behind) parts.push(make("polyline", { class: `bold${colour}`, points: join(line) }));
    return parts;
  }

  function drawAll() { charts.forEach(draw); point(); }

  // --- the cursor ----------------------------------------------------------------------------

  function point() {
    const told = view.at === null ? "" : where();
    output.textContent = told;
    for (const chart of charts) {
      const parts = [], words = [], { ends, px } = chart.x;
      if (view.at !== null && view.at >= chart.x.x0 && view.at <= chart.x.x1) {
        parts.push(make("line", { x1: px(view.at), x2: px(view.at), y1: ends.top, y2: ends.bottom }));
        for (const line of chart.lines.filter((one) => !one.behind)) {
          const best = nearest(line.points, view.at);
          if (!best) continue;
          parts.push(make("circle", { class: `dot${line.colour}`, cx: px(best.x), cy: chart.y(best.y), r: 4 }));
          const range = best.high > best.low ? ` (${plain(best.low)} to ${plain(best.high)})` : "";
          words.push(`${data.runs.length > 1 ? `${line.run.name}: ` : ""}${plain(best.y)}${range}`);
        }
      }
      if (view.drag && view.drag.chart === chart && Math.abs(view.drag.to - view.drag.from) >= DRAG_PX) {
        const [a, b] = [view.drag.from, view.drag.to].map((x) => px(valueAt(chart, x))).sort((p, q) => p - q);
        parts.push(make("rect", { class: "chosen", x: a, width: b - a, y: ends.top, height: ends.bottom - ends.top }));
      }
      chart.cursor.replaceChildren(...parts);
      chart.readout.textContent = words.join(" · ");
      chart.svg.setAttribute("aria-valuenow", view.at ?? chart.x.x0);
      chart.svg.setAttribute("aria-valuetext", [told, ...words].filter(Boolean).join("; ") || "no cursor: press an arrow key");
    }
  }

  // The same place on every axis, and the step of the nearest pictures.
  function where() {
    const first = shownRuns().find(({ run }) => run.training.axes[view.axis].length);
    if (!first) return "";
    const { axes } = first.run.training;
    const best = nearest(axes[view.axis].map((x, idx) => ({ x, idx })).filter((p) => p.x !== null), view.at);
    if (!best) return "";
    const words = Object.entries({ images: "images", steps: "steps", hours: "h", joules: "J" })
      .filter(([name]) => axes[name][best.idx] !== null).map(([name, unit]) => `${whole(axes[name][best.idx])} ${unit}`);
    const pictures = nearest(first.run.pictures.map((x) => ({ x })), axes.steps[best.idx]);
    if (pictures) words.push(`nearest pictures: step ${pictures.x.toLocaleString("en-US")}`);
    return words.join(" · ");
  }

  function moveTo(x) {
    view.at = x;
    if (!frame) frame = requestAnimationFrame(() => { frame = 0; point(); });
  }

  function valueAt(chart, clientX) {
    const box = chart.svg.getBoundingClientRect(), { x0, x1, ends } = chart.x;
    const px = (clientX - box.left) / box.width * chart.width;
    return x0 + Math.min(1, Math.max(0, (px - ends.left) / (ends.right - ends.left))) * (x1 - x0);
  }

  // Places that the cursor can take: those of the training rows that are shown.
  function places() {
    const [x0, x1] = xSpan();
    const xs = shownRuns().flatMap(({ run }) => run.training.axes[view.axis].filter((x, idx) =>
      x !== null && x >= x0 && x <= x1 && !view.attempts.has(run.training.attempts[idx])));
    return [...new Set(xs)].sort((a, b) => a - b);
  }

  function hover(chart, event) {
    if (view.drag) view.drag.to = event.clientX;
    const best = nearest(places().map((x) => ({ x })), valueAt(chart, event.clientX));
    moveTo(best ? best.x : null);
  }

  function zoom(range) { view.range = range; drawAll(); }

  function press(event) {
    const all = places(), last = all.length - 1;
    const now = view.at === null ? -1 : all.indexOf(nearest(all.map((x) => ({ x })), view.at)?.x);
    const by = event.shiftKey ? 10 : 1, [x0, x1] = xSpan();
    const moves = { ArrowRight: now + by, ArrowLeft: (now < 0 ? last + 1 : now) - by, Home: 0, End: last };
    if (event.key in moves && last >= 0) moveTo(all[Math.min(last, Math.max(0, moves[event.key]))]);
    else if (event.key === "+" && view.at !== null) zoom([view.at - (x1 - x0) / 4, view.at + (x1 - x0) / 4]);
    else if (event.key === "Escape") zoom(null);
    else return;
    event.preventDefault();
  }

  addEventListener("pointerup", (event) => {
    const drag = view.drag;
    view.drag = null;
    if (!drag || Math.abs(event.clientX - drag.from) < DRAG_PX) return;
    const [a, b] = [drag.from, event.clientX].map((x) => valueAt(drag.chart, x)).sort((p, q) => p - q);
    if (b > a) zoom([a, b]);
  });

  // --- the tools -----------------------------------------------------------------------------

  const output = make("output", { id: "place", "aria-live": "off" });
  const status = make("span", { id: "status", role: "status" });

  function tick(label, isOn, change, style = "") {
    const box = make("input", { type: "checkbox" });
    box.checked = isOn;
    box.addEventListener("change", () => change(box.checked));
    return make("label", {}, box, ...(style ? [make("i", { class: `swatch ${style}` })] : []), ` ${label}`);
  }

  function choose(set, value) {
    return (isOn) => { if (isOn) set.delete(value); else set.add(value); drawAll(); };
  }

  function fillTools() {
    const axis = make("select", { id: "axis" });
    for (const [name, words] of Object.entries(AXES))
      if (data.runs.some((run) => run.training.axes[name].some((x) => x !== null)))
        axis.append(make("option", { value: name }, words));
    axis.value = view.axis;
    axis.addEventListener("change", () => { view.axis = axis.value; view.at = null; zoom(null); });
    const reset = make("button", { type: "button", id: "reset" }, "Whole run");
    reset.addEventListener("click", () => zoom(null));
    const parts = [make("label", {}, "x axis ", axis), reset];
    const attempts = [...new Set(data.runs.flatMap((run) => run.training.attempts))].filter((one) => one !== null).sort((a, b) => a - b);
    if (attempts.length > 1) parts.push(make("fieldset", { id: "attempts" }, make("legend", {}, "attempts"),
      ...attempts.map((one) => tick(String(one), !view.attempts.has(one), choose(view.attempts, one)))));
    if (data.runs.length > 1) parts.push(make("fieldset", { id: "runs" }, make("legend", {}, "runs"),
      ...data.runs.map((run, idx) => tick(run.name, !view.runs.has(idx), choose(view.runs, idx), `run${idx % 8}`))));
    tools.replaceChildren(...parts, status, output);
    tools.hidden = false;
  }

  // --- while the run goes on -----------------------------------------------------------------

  async function poll() {
    try {
      const answer = await fetch("data.json", { cache: "no-store" });
      if (!answer.ok) throw new Error("the server cannot read the run, and says why in its terminal");
      const fresh = await answer.json();
      const drawn = new Set(charts.map((chart) => chart.id));
      // Tables and new charts are the server's to write.
      if (fresh.state !== data.state || fresh.panels.some((panel) => panel.drawn && !drawn.has(panel.id))) return location.reload();
      if (JSON.stringify(fresh) !== JSON.stringify(data)) { data = fresh; fillTools(); drawAll(); }
      status.textContent = data.state === "running" ? "live" : `the run is ${data.state}`;
    } catch (error) {
      // What fetch itself throws is a TypeError.
      const why = error instanceof TypeError ? "the server is gone" : error.message;
      status.textContent = `${why}; what is shown stays`;
    }
    if (data.state === "running" || status.textContent.startsWith("the server")) setTimeout(poll, POLL_MS);
  }

  if (!charts.length && !tools.dataset.live) return;
  fillTools();
  drawAll();
  if (tools.dataset.live) poll();
})();
