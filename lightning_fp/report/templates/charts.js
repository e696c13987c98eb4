"use strict";
// Draws every chart of the report: fields with lines, strips of formats, heatmaps, rates. No library.
(() => {
  const charts = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const root = document.documentElement;
  const COLORS = 8;
  const RIGHT = 10;
  const LANE = 18;
  const GAP = 32;
  root.dataset.errors = "0";
  addEventListener("error", () => { root.dataset.errors = String(+root.dataset.errors + 1); });

  // -- helpers -----------------------------------------------------------------------------------

  const svg = (name, attributes = {}, parent = null, text = "") => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== "") node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };
  const html = (name, className = "", text = "", parent = null) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== "") node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };
  const color = (i) => i === -2 ? "var(--ink)" : i < 0 ? "var(--soft)" : `var(--c${i % COLORS})`;
  const whole = (x) => Math.round(x).toLocaleString("en");
  const shown = (v, unit = "") => {
    if (v === null || v === undefined || Number.isNaN(v)) return "not measured";
    const size = Math.abs(v);
    const text = v === 0 ? "0" : size >= 1e5 || size < 1e-3 ? v.toExponential(2) : String(+v.toPrecision(4));
    return unit === "%" ? `${text}%` : unit ? `${text} ${unit}` : text;
  };
  const measure = document.createElement("canvas").getContext("2d");
  measure.font = "11px system-ui, sans-serif";
  const wide = (text) => measure.measureText(text).width;
  // Names lose letters from their parts first, from the front, so that the numbers of blocks stay.
  const shortened = (name, width) => {
    const parts = name.split(".");
    for (let i = 0; i < parts.length - 1 && wide(parts.join(".")) > width; i++) parts[i] = parts[i].replace(/^([a-z])[a-z_]+$/i, "$1");
    const text = parts.join(".");
    let kept = text.length, short = text;
    while (kept > 3 && wide(short) > width) {
      const head = Math.floor(--kept / 3);
      short = `${text.slice(0, head)}…${text.slice(text.length - (kept - head))}`;
    }
    return short;
  };
  // How much room the names of rows get on the left.
  const margin = (names, width, least) => {
    const longest = names.reduce((most, name) => Math.max(most, wide(name)), 0) + 14;
    return Math.round(Math.max(least, Math.min(longest, width * 0.34, 280)));
  };
  const ticks = (low, high, count) => {
    const rough = (high - low) / Math.max(1, count);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(+(i * step).toPrecision(12));
    return found;
  };
  const levels = (low, high, count) => {
    const found = ticks(low, high, count);
    return found.length > 1 ? found : ticks(low, high, 2 * count);
  };
  const decades = (low, high) => {
    const found = [];
    const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
    const every = Math.max(1, Math.ceil((last - first + 1) / 5));
    for (let e = first; e <= last; e += every) found.push(10 ** e);
    return found.length > 1 ? found : ticks(low, high, 3).filter((v) => v > 0);
  };
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1; else high = middle;
    }
    return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
  };
  const legend = (el, names) => {
    const box = html("div", "legend", "", el);
    for (const { name, fill, dotted } of names) {
      const entry = html("span", "", "", box);
      html("i", "", "", entry).style.background = dotted ? `radial-gradient(circle 1.7px, ${fill} 96%, transparent) 0 0 / 5px 10px` : fill;
      entry.append(name);
    }
    return box;
  };

  const hide = () => { tip.hidden = true; };
  const tell = (el, x, y, title, rows) => {
    tip.replaceChildren();
    html("b", "", title, tip);
    for (const [name, value] of rows) {
      const row = html("div", "", "", tip);
      html("span", "", name, row);
      if (value) html("span", "", value, row);
    }
    tip.hidden = false;
    const box = el.getBoundingClientRect();
    const width = tip.offsetWidth, right = document.documentElement.clientWidth - 4;
    const left = Math.max(4, Math.min(box.left + x + 14, right - width));
    const covered = left < box.left + x + 10 && left + width > box.left + x - 10;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${box.top + scrollY + y + (covered ? 24 : 10)}px`;
  };
  // Pointer and arrow keys move the same cursor, of one or two dimensions.
  const follow = (el, { at, move }) => {
    el.onpointermove = el.onpointerdown = (event) => {
      const box = el.getBoundingClientRect();
      at(event.clientX - box.left, event.clientY - box.top);
    };
    el.onpointerleave = (event) => { if (event.pointerType === "mouse") { hide(); at(null); } };
    el.onblur = () => { hide(); at(null); };
    el.onkeydown = (event) => {
      const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] || [0, 0];
      if (event.key === "Escape") { hide(); at(null); }
      if ((dx || dy) && move(dx, dy)) event.preventDefault();
    };
  };

  // -- events beneath a chart: green is passed or given back, orange is trouble, amber is a question,
  // blue is a change of format or stage; grey is high precision and what a run is compared with --------------------------------------------------------------------

  const SHAPES = {
    stage: ["M-1-6h2v12h-2z", 0], gate: ["M-4-4h8v8h-8z", 2], gate_failed: ["M-4-4h8v8h-8z", 1],
    fault: ["M-6 0l6-6 6 6-6 6z", 1], innocent: ["M-6 0l6-6 6 6-6 6z", 2], open: ["M0-5a5 5 0 1 0 .01 0z", 4],
    safer: ["M-5-4h10l-5 8z", 1], promote: ["M-5 4h10l-5-8z", 2], format: ["M-4-4h8v8h-8z", 0],
    rollback: ["M5-5l-9 5 9 5z", 4], skip: ["M-1-5h2v10h-2z", 1], resumed: ["M-4-5l8 5-8 5z", -1],
    watch_failed: ["M-5-3l2-2 3 3 3-3 2 2-3 3 3 3-2 2-3-3-3 3-2-2 3-3z", 1],
  };
  const WHOLE_HEIGHT = ["fault", "promote", "stage", "watch_failed"];
  const drawKey = (el, lanes) => {
    const entries = lanes.flatMap((lane) => lane.key);
    if (!entries.length) return;
    const box = html("div", "legend key", "", el);
    for (const { shape, name } of entries) {
      const entry = html("span", "", "", box);
      const picture = svg("svg", { viewBox: "-7 -7 14 14", width: 14, height: 14, "aria-hidden": "true" }, entry);
      const [path, hue] = SHAPES[shape];
      svg("path", { d: path, fill: color(hue) }, picture);
      entry.append(name);
    }
  };
  // Steps that were undone are hatched: what is drawn there is no longer part of the model.
  let patterns = 0;
  const hatch = (svgNode, stretches, x, top, height, look = "hatch") => {
    if (!stretches || !stretches.length) return;
    const id = `hatch${patterns++}`;
    const pattern = svg("pattern", { id, width: 7, height: 7, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, svg("defs", {}, svgNode));
    svg("rect", { class: look, width: 2, height: 7 }, pattern);
    for (const [from, to] of stretches) {
      const width = Math.max(1, x(to) - x(from));
      svg("rect", { x: x(from), y: top, width, height, fill: `url(#${id})` }, svgNode);
    }
  };
  const nameUndone = (svgNode, stretches, x, y) => {
    for (const [from, to] of stretches || [])
      if (x(to) - x(from) > 46) svg("text", { class: "undone", x: (x(from) + x(to)) / 2, y, "text-anchor": "middle" }, svgNode, "undone");
  };
  const drawLanes = (svgNode, lanes, x, left, top, width) => lanes.map((lane, i) => {
    const y = top + i * LANE + LANE / 2;
    svg("line", { class: "grid", x1: left, x2: width - RIGHT, y1: y, y2: y }, svgNode);
    svg("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, svgNode, lane.name);
    for (const mark of lane.marks) {
      const [shape, hue] = SHAPES[mark.shape];
      const fill = color(hue);
      const a = x(mark.step), b = x(mark.end);
      if (b - a > 3) svg("rect", { x: a, y: y - 2, width: b - a, height: 4, fill, opacity: 0.6 }, svgNode);
      svg("path", { d: shape, transform: `translate(${b} ${y})`, fill }, svgNode);
    }
    return y;
  });
  const near = (lanes, x, at) => lanes.flatMap((lane) => lane.marks
    .filter((mark) => x(mark.step) - 5 <= at && at <= x(mark.end) + 5)
    .slice(0, 3)
    .map((mark) => [`${lane.key.find((entry) => entry.shape === mark.shape).name}: ${mark.count > 1 ? `${mark.count} between steps ${whole(mark.step)} and ${whole(mark.end)}` : mark.text}`.slice(0, 220), ""]));
  const drawSteps = (svgNode, x, first, last, left, width, y) => {
    svg("line", { class: "axis", x1: left, x2: width - RIGHT, y1: y, y2: y }, svgNode);
    for (const step of ticks(first, last, width < 500 ? 4 : 8).filter(Number.isInteger)) {
      svg("line", { class: "axis", x1: x(step), x2: x(step), y1: y, y2: y + 4 }, svgNode);
      const anchor = x(step) > width - 30 ? "end" : "middle";
      svg("text", { x: x(step), y: y + 16, "text-anchor": anchor }, svgNode, whole(step));
    }
    svg("text", { x: left - 8, y: y + 16, "text-anchor": "end" }, svgNode, "step");
  };

  // -- fields with lines -------------------------------------------------------------------------

  const path = (xs, ys) => {
    let d = "", pen = false;
    for (let i = 0; i < xs.length; i++) {
      if (ys[i] === null) { pen = false; continue; }
      d += `${pen ? "L" : "M"}${xs[i].toFixed(1)} ${ys[i].toFixed(1)}`;
      pen = true;
    }
    return d;
  };
  const range = (field) => {
    let low = Infinity, high = -Infinity;
    for (const line of field.series)
      for (const v of [...line.values, ...(line.low || []), ...(line.high || [])])
        if (v !== null) { low = Math.min(low, v); high = Math.max(high, v); }
    if (low > high) [low, high] = [0, 1];
    if (field.log) return low < high ? [low, high] : [low / 2, high * 2];
    if (low > 0 && low < 0.2 * high) low = 0;
    const room = high > low ? (high - low) * 0.06 : Math.abs(high) * 0.1 || 1;
    return [low === 0 ? 0 : low - room, high + room];
  };

  const panels = (el, spec) => {
    const several = spec.panels.filter((field) => field.series.length > 1);
    if (several.length)
      legend(el, several[0].series.map((line) => ({ name: line.name, fill: color(line.color), dotted: line.dotted })));
    const width = el.clientWidth;
    const left = spec.lanes.length ? 76 : 60;
    const labels = spec.panels.flatMap((field) => field.series).filter((line) => line.last !== undefined);
    const ends = labels.length ? Math.max(...labels.map((line) => wide(shown(line.last)))) * 1.1 + 8 : 0;
    const x = (step) => left + (step - spec.first) / (spec.last - spec.first) * (width - left - RIGHT - ends);
    const fieldsHeight = spec.panels.reduce((sum, field) => sum + field.height + GAP, 0);
    const bottom = fieldsHeight + spec.lanes.length * LANE + 4;
    const picture = svg("svg", { viewBox: `0 0 ${width} ${bottom + 22}`, height: bottom + 22, "aria-hidden": "true" }, el);
    hatch(picture, spec.undone, x, 18, fieldsHeight - 18);
    const through = spec.lanes.flatMap((lane) => lane.marks).filter((mark) => WHOLE_HEIGHT.includes(mark.shape));
    if (through.length <= 40)
      for (const mark of through) svg("line", { class: "through", x1: x(mark.step), x2: x(mark.step), y1: 18, y2: bottom }, picture);
    let top = 0;
    const drawn = [];
    for (const field of spec.panels) {
      const [low, high] = range(field);
      const scale = field.log ? Math.log10 : (v) => v;
      const y = (v) => top + 22 + (1 - (scale(v) - scale(low)) / (scale(high) - scale(low))) * field.height;
      const unit = field.unit ? ` (${field.unit})` : "";
      svg("text", { class: "title", x: left, y: top + 13 }, picture, `${field.title}${unit}${field.log ? ", logarithmic" : ""}`);
      for (const v of field.log ? decades(low, high) : levels(low, high, field.height < 120 ? 2 : 4)) {
        svg("line", { class: "grid", x1: left, x2: width - RIGHT, y1: y(v), y2: y(v) }, picture);
        svg("text", { x: left - 8, y: y(v) + 4, "text-anchor": "end" }, picture, shown(v));
      }
      for (const line of field.series) {
        const xs = line.steps.map(x), stroke = color(line.color);
        const height = (v) => v === null ? null : y(v);
        if (line.low) {
          let area = "";
          line.low.forEach((v, i) => { if (v !== null) area += `M${xs[i].toFixed(1)} ${y(line.high[i]).toFixed(1)}V${(y(v) + 0.5).toFixed(1)}`; });
          svg("path", { d: area, stroke, opacity: 0.3, fill: "none" }, picture);
        }
        if (!line.dotted || !line.smooth) svg("path", { class: line.dotted ? "mean dots" : line.smooth ? "raw" : "raw alone", stroke, d: path(xs, line.values.map(height)) }, picture);
        if (line.smooth) svg("path", { class: line.dotted ? "mean dots" : "mean", stroke, d: path(xs, line.smooth.map(height)), }, picture);
        if (line.points)
          line.values.forEach((v, i) => { if (v !== null) svg("circle", { cx: xs[i], cy: y(v), r: 2.5, fill: stroke }, picture); });
        for (const step of line.bad) svg("path", { d: `M${x(step) - 3} ${top + 19}l6 6m0-6l-6 6`, stroke: "var(--alarm)", "stroke-width": 1.5 }, picture);
      }
      if (field.limit && field.limit.value >= low && field.limit.value <= high) {
        svg("line", { class: "limit", x1: left, x2: width - RIGHT, y1: y(field.limit.value), y2: y(field.limit.value) }, picture);
        svg("text", { x: width - RIGHT, y: y(field.limit.value) - 4, "text-anchor": "end" }, picture, `limit ${shown(field.limit.value, field.unit)}`);
      }
      // Values at the ends of the lines, moved apart where they would cover each other.
      let free = Infinity;
      for (const line of field.series.filter((l) => l.last !== undefined).sort((a, b) => a.last - b.last)) {
        const at = Math.min(y(Math.max(low, Math.min(high, line.last))) + 4, free);
        svg("text", { class: "end", x: x(spec.last) + 6, y: at, style: `fill: ${color(line.color)}` }, picture, shown(line.last));
        free = at - 13;
      }
      drawn.push({ field, y });
      top += field.height + GAP;
    }
    drawLanes(picture, spec.lanes, x, left, fieldsHeight + 4, width);
    drawSteps(picture, x, spec.first, spec.last, left, width, bottom);
    drawKey(el, spec.lanes);
    nameUndone(picture, spec.undone, x, 13);
    const cursor = svg("line", { class: "cursor", y1: 18, y2: bottom, visibility: "hidden" }, picture);
    let here = spec.first;
    const show = (step, y) => {
      const rows = [];
      let at = step;
      for (const { field } of drawn)
        for (const line of field.series) {
          if (!line.steps.length) continue;
          const i = nearest(line.steps, step);
          if (!rows.length) at = line.steps[i];
          const name = field.series.length > 1 || drawn.length === 1 ? line.name : field.title;
          const spread = line.low && line.low[i] !== null ? ` (${shown(line.low[i])} to ${shown(line.high[i])})` : "";
          rows.push([name, line.bad.includes(line.steps[i]) ? "not finite" : shown(line.values[i], field.unit) + spread]);
        }
      rows.push(...near(spec.lanes, x, x(step)));
      cursor.setAttribute("visibility", "visible");
      cursor.setAttribute("x1", x(at));
      cursor.setAttribute("x2", x(at));
      tell(el, x(at), y, `step ${whole(at)}`, rows);
    };
    follow(el, {
      at: (px, py) => {
        if (px === null) return cursor.setAttribute("visibility", "hidden");
        here = Math.max(spec.first, Math.min(spec.last, spec.first + (px - left) / (width - left - RIGHT - ends) * (spec.last - spec.first)));
        show(here, py - (several.length ? 24 : 0));
      },
      move: (dx) => {
        if (!dx) return false;
        here = Math.max(spec.first, Math.min(spec.last, here + dx * Math.max(1, (spec.last - spec.first) / 100)));
        show(here, 20);
        return true;
      },
    });
  };

  // -- strips ------------------------------------------------------------------------------------

  const strips = (el, spec) => {
    let hue = 0;
    const calm = [0, 5, 3, 6, 7]; // blues and violets: green and orange say passed and trouble
    const fills = new Map(spec.names.map(({ name, high, number = hue++ }) => [name, high ? "var(--grey)" : color(calm[number % calm.length])]));
    const high = new Set(spec.names.filter((entry) => entry.high).map((entry) => entry.name));
    legend(el, spec.names.map(({ name }) => ({ name, fill: fills.get(name) })));
    const width = el.clientWidth, lanes = spec.lanes || [];
    const left = margin(spec.rows.map((row) => row.label), width, lanes.length ? 76 : 40);
    const row = spec.rows.length > 60 ? 8 : spec.rows.length > 25 ? 14 : 22;
    const every = Math.ceil(13 / row);
    const x = (step) => left + step / spec.last * (width - left - RIGHT);
    const bottom = spec.rows.length * row + lanes.length * LANE + 4;
    const picture = svg("svg", { viewBox: `0 0 ${width} ${bottom + 22}`, height: bottom + 22, "aria-hidden": "true" }, el);
    const offset = () => picture.getBoundingClientRect().top - el.getBoundingClientRect().top;
    spec.rows.forEach((entry, i) => {
      if (i % every === 0) svg("text", { x: left - 8, y: i * row + row / 2 + 4, "text-anchor": "end" }, picture, shortened(entry.label, left - 10));
      for (const part of entry.segments) {
        const a = x(part.from), b = Math.max(x(part.to), a + 1);
        svg("rect", { x: a, y: i * row + 1, width: b - a, height: row - 2, fill: fills.get(part.name) }, picture);
        if (row >= 20 && b - a > wide(part.name) * 1.1 + 12)
          svg("text", { class: "inside", x: a + 6, y: i * row + row / 2 + 4, style: `fill: var(${high.has(part.name) ? "--on-grey" : "--on-fill"})` }, picture, part.name);
      }
    });
    hatch(picture, spec.undone, x, 0, spec.rows.length * row, "hatch-out");
    drawLanes(picture, lanes, x, left, spec.rows.length * row + 2, width);
    drawSteps(picture, x, 0, spec.last, left, width, bottom);
    drawKey(el, lanes);
    let i = 0, step = 0;
    const show = () => {
      const entry = spec.rows[i];
      const part = entry.segments.filter((part) => part.from <= step).pop() || entry.segments[0];
      const rows = [[part.name, `steps ${whole(part.from)} to ${whole(part.to)}`], ...near(lanes, x, x(step))];
      if (entry.title !== entry.label) rows.push([entry.title, ""]);
      tell(el, x(step), offset() + i * row + row, entry.label, rows);
    };
    follow(el, {
      at: (px, py) => {
        if (px === null) return;
        i = Math.max(0, Math.min(spec.rows.length - 1, Math.floor((py - offset()) / row)));
        step = Math.max(0, Math.min(spec.last, (px - left) / (width - left - RIGHT) * spec.last));
        show();
      },
      move: (dx, dy) => {
        i = Math.max(0, Math.min(spec.rows.length - 1, i + dy));
        step = Math.max(0, Math.min(spec.last, step + dx * spec.last / 50));
        show();
        return true;
      },
    });
  };

  // -- heatmaps ----------------------------------------------------------------------------------

  const RAMPS = {
    light: { fine: [[238, 243, 249], [36, 96, 160]], bad: [[244, 170, 96], [168, 58, 0]] },
    dark: { fine: [[34, 44, 56], [98, 172, 236]], bad: [[150, 88, 36], [255, 142, 40]] },
  };
  const mixed = ([a, b], t) => a.map((v, i) => Math.round(v + (b[i] - v) * Math.max(0, Math.min(1, t))));
  const GOOD = 32; // dB that no 8-bit cast needs to exceed
  // How bad a value is: below 1 is fine, from 1 to 2 over the limit.
  const badness = (spec) => spec.low_is_bad
    ? (v) => v >= spec.limit ? 0.08 + 0.91 * Math.max(0, Math.min(1, (GOOD - v) / (GOOD - spec.limit))) : 1 + Math.min(1, (spec.limit - v) / 20)
    : (v) => v <= 0 ? 0 : v < spec.limit ? Math.max(0.04, 1 + Math.log10(v / spec.limit) / 4 - 0.001) : 1 + Math.min(1, Math.log10(v / spec.limit) / -Math.log10(spec.limit));

  const heatmap = (el, spec) => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const ramps = dark ? RAMPS.dark : RAMPS.light;
    const rgb = (b) => b < 1 ? mixed(ramps.fine, b) : mixed(ramps.bad, b - 1);
    const ink = getComputedStyle(root).getPropertyValue("--soft").trim();
    const bytes = Uint8Array.from(atob(spec.values), (c) => c.charCodeAt(0));
    const values = new Float32Array(bytes.buffer);
    const rows = spec.rows.length, columns = spec.columns.length;
    const percent = spec.unit === "%" ? 100 : 1;

    const scale = html("div", "legend", "", el);
    const gradient = (from, to) => `linear-gradient(to right, ${[0, .25, .5, .75, 1].map((t) => `rgb(${rgb(from + (to - from) * t * .999)})`).join(", ")})`;
    const fine = html("span", "scale", "", scale), bad = html("span", "scale", "", scale);
    fine.append(spec.low_is_bad ? `${GOOD} dB or more` : "0");
    html("i", "", "", fine).style.background = gradient(0, 1);
    fine.append(`limit ${shown(spec.limit * percent, spec.unit)}`);
    html("i", "", "", bad).style.background = gradient(1, 2);
    bad.append(spec.low_is_bad ? `${spec.limit - 20} dB` : "100%");
    html("span", "", "blank: not measured, or in high precision", scale);

    const width = el.clientWidth;
    const left = margin(spec.rows, width, 40);
    const row = rows > 100 ? 3 : rows > 40 ? 6 : rows > 16 ? 13 : 18;
    const height = rows * row, below = 22;
    const canvas = html("canvas", "", "", el);
    const dpr = devicePixelRatio || 1;
    canvas.width = width * dpr;
    canvas.height = (height + below) * dpr;
    canvas.style.height = `${height + below}px`;
    const pen = canvas.getContext("2d");
    pen.scale(dpr, dpr);
    const small = document.createElement("canvas");
    const inner = width - left - RIGHT;
    // Where there are fewer pixels than columns each shows the worst of its columns.
    const across = Math.max(1, Math.min(columns, Math.floor(inner * dpr)));
    small.width = across;
    small.height = rows;
    const image = new ImageData(across, rows);
    const how = badness(spec);
    const worst = new Float32Array(across * rows).fill(-1);
    for (let i = 0; i < values.length; i++) {
      if (Number.isNaN(values[i])) continue;
      const at = Math.floor(i / columns) * across + Math.floor(i % columns * across / columns);
      worst[at] = Math.max(worst[at], how(values[i]));
    }
    worst.forEach((bad, at) => { if (bad >= 0) image.data.set([...rgb(bad), 255], at * 4); });
    small.getContext("2d").putImageData(image, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(small, left, 0, inner, height);
    for (const [from, to] of spec.undone || []) {
      const inside = spec.columns.map(([a, b], c) => b > from && a <= to ? c : -1).filter((c) => c >= 0);
      if (!inside.length) continue;
      const a = left + inside[0] / columns * inner, b = left + (inside[inside.length - 1] + 1) / columns * inner;
      pen.save();
      pen.beginPath();
      pen.rect(a, 0, b - a, height);
      pen.clip();
      pen.strokeStyle = ink;
      pen.globalAlpha = 0.45;
      pen.beginPath();
      for (let at = a - height; at < b; at += 9) { pen.moveTo(at, height); pen.lineTo(at + height, 0); }
      pen.stroke();
      pen.restore();
    }
    pen.fillStyle = ink;
    pen.font = measure.font;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const every = Math.ceil(13 / row);
    for (let i = 0; i < rows; i += every) pen.fillText(shortened(spec.rows[i], left - 10), left - 8, i * row + Math.max(row, 12) / 2);
    pen.fillText("step", left - 8, height + 12);
    const count = Math.min(columns, width < 500 ? 4 : 8);
    for (let k = 0; k < count; k++) {
      const c = Math.floor(k * columns / count);
      pen.textAlign = "left";
      pen.fillText(whole(spec.columns[c][0]), left + c / columns * inner, height + 12);
    }
    const box = html("div", "", "", el);
    box.style.cssText = "position:absolute;pointer-events:none;border:1.5px solid var(--ink);display:none";
    let i = 0, c = 0;
    const show = () => {
      const top = canvas.offsetTop + i * row, at = left + c / columns * inner;
      box.style.cssText += `;display:block;left:${at - 1}px;top:${top - 1}px;width:${Math.max(4, inner / columns + 2)}px;height:${row + 2}px`;
      const [a, b] = spec.columns[c];
      const v = values[i * columns + c];
      const text = Number.isNaN(v) ? "not measured" : spec.low_is_bad && v >= 149.9 ? "lossless" : shown(v * percent, spec.unit);
      tell(el, at, top + row, spec.rows[i], [[a === b ? `step ${whole(a)}` : `steps ${whole(a)} to ${whole(b)}`, ""], [spec.name, text]]);
    };
    follow(el, {
      at: (px, py) => {
        if (px === null) { box.style.display = "none"; return; }
        i = Math.max(0, Math.min(rows - 1, Math.floor((py - canvas.offsetTop) / row)));
        c = Math.max(0, Math.min(columns - 1, Math.floor((px - left) / inner * columns)));
        show();
      },
      move: (dx, dy) => {
        i = Math.max(0, Math.min(rows - 1, i + dy));
        c = Math.max(0, Math.min(columns - 1, c + dx));
        show();
        return true;
      },
    });
  };

  // -- rates with their intervals ----------------------------------------------------------------

  const rates = (el, spec) => {
    legend(el, spec.series.map((line) => ({ name: line.name, fill: color(line.color) })));
    const width = el.clientWidth, height = 220, left = 60, many = spec.categories.length;
    const inner = width - left - RIGHT, each = inner / many;
    // Formats stand beside each other within a category, so that no bar hides another.
    const x = (c, s) => left + each * (c + 0.5 + (s - (spec.series.length - 1) / 2) * Math.min(0.16, 0.7 / spec.series.length));
    const y = (v) => 8 + (1 - v) * (height - 16);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height + 22}`, height: height + 22, "aria-hidden": "true" }, el);
    for (const v of [0, 0.25, 0.5, 0.75, 1]) {
      svg("line", { class: "grid", x1: left, x2: width - RIGHT, y1: y(v), y2: y(v) }, picture);
      svg("text", { x: left - 8, y: y(v) + 4, "text-anchor": "end" }, picture, `${v * 100}%`);
    }
    spec.categories.forEach((name, c) => svg("text", { x: left + each * (c + 0.5), y: height + 16, "text-anchor": "middle" }, picture, name));
    spec.series.forEach((line, s) => {
      const stroke = color(line.color);
      const at = line.points.map((point, c) => point && [x(c, s), y(point.value)]);
      svg("path", { class: "mean", d: path(at.map((p) => p && p[0]), at.map((p) => p && p[1])), stroke, opacity: 0.5 }, picture);
      line.points.forEach((point, c) => {
        if (!point) return;
        svg("line", { x1: x(c, s), x2: x(c, s), y1: y(point.low), y2: y(point.high), stroke, "stroke-width": 2 }, picture);
        svg("circle", { cx: x(c, s), cy: y(point.value), r: 4, fill: stroke }, picture);
      });
    });
    const percent = (v) => `${Math.round(v * 100)}%`;
    let c = 0;
    const show = () => tell(el, left + each * (c + 0.5), 40, spec.categories[c], spec.series.filter((line) => line.points[c]).map(
      (line) => [line.name, `${percent(line.points[c].value)} [${percent(line.points[c].low)}, ${percent(line.points[c].high)}]`]));
    follow(el, {
      at: (px) => { if (px !== null) { c = Math.max(0, Math.min(many - 1, Math.floor((px - left) / each))); show(); } },
      move: (dx) => { c = Math.max(0, Math.min(many - 1, c + dx)); show(); return true; },
    });
  };

  // -- drawing, and drawing again ----------------------------------------------------------------

  const kinds = { panels, strips, heatmap, rates };
  const draw = (el) => {
    if (!el.clientWidth) return;
    el.replaceChildren();
    const spec = charts[+el.dataset.chart];
    try {
      kinds[spec.type](el, spec);
      el.dataset.drawn = String(el.clientWidth);
    } catch (error) {
      root.dataset.errors = String(+root.dataset.errors + 1);
      html("p", "empty", "This chart cannot be drawn here.", el);
      console.error(spec.title, error);
    }
  };
  const all = [...document.querySelectorAll("[data-chart]")];
  const again = new ResizeObserver((entries) => {
    for (const { target } of entries)
      if (target.dataset.drawn !== String(target.clientWidth)) draw(target);
  });
  for (const el of all) { draw(el); again.observe(el); }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => all.forEach(draw));
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
  const opened = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (target && target.tagName === "DETAILS") target.open = true;
  };
  if (innerWidth < 480) for (const long of document.querySelectorAll("details.long")) long.open = false;
  addEventListener("hashchange", opened);
  opened();
  root.dataset.charts = String(all.filter((el) => el.dataset.drawn).length);
})();
