"use strict";
(() => {
  const find = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const runs = JSON.parse(find("#data").textContent);
  const table = find("#table");
  const bodies = all("tbody.run");
  const COLOURS = 8, STYLES = 3, PICKED_AT_FIRST = 8;
  const SVG = "http://www.w3.org/2000/svg";

  // Sorting: runs without a value come last in either direction

  const cellOf = (body, key) => find(`[data-key="${key}"]`, body);
  const valueOf = (body, key) => {
    const cell = cellOf(body, key);
    return "sort" in cell.dataset ? cell.dataset.sort : cell.textContent.trim();
  };
  const compare = (left, right) => {
    const numbers = [Number(left), Number(right)];
    if (!numbers.some(Number.isNaN)) return numbers[0] - numbers[1];
    return left.localeCompare(right, "en", { numeric: true });
  };
  function sortBy(key, direction) {
    const keyed = bodies.map((body) => [valueOf(body, key), Number(body.dataset.index), body]);
    const sign = direction === "ascending" ? 1 : -1;
    keyed.sort((a, b) => {
      if ((a[0] === "") !== (b[0] === "")) return a[0] === "" ? 1 : -1;
      return sign * compare(a[0], b[0]) || a[1] - b[1];
    });
    table.append(...keyed.map((one) => one[2]));
    for (const head of all("thead th", table)) head.removeAttribute("aria-sort");
    find(`thead th[data-key="${key}"]`).setAttribute("aria-sort", direction);
  }
  for (const head of all("thead th[data-key]", table)) {
    const button = find("button", head), key = head.dataset.key;
    const first = head.dataset.first || "ascending";
    const second = first === "ascending" ? "descending" : "ascending";
    button.addEventListener("click", () => sortBy(key, head.getAttribute("aria-sort") === first ? second : first));
    for (const [direction, arrow] of [["ascending", "↑"], ["descending", "↓"]])
      find("#sort").append(new Option(`${button.textContent} ${arrow}`, `${key} ${direction}`));
  }
  find("#sort").addEventListener("change", (event) => {
    if (event.target.value) sortBy(...event.target.value.split(" "));
  });

  // Filtering: shows or hides everything that belongs to a run

  const texts = bodies.map((body) => `${body.dataset.name} ${body.textContent}`.toLowerCase());
  const parts = all("[data-index]");
  let shown = new Set(runs.keys());
  function filter() {
    const words = find("#filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const status = find("#status").value;
    shown = new Set();
    bodies.forEach((body, index) => {
      const fits = words.every((word) => texts[index].includes(word));
      if (fits && (!status || body.dataset.status === status)) shown.add(Number(body.dataset.index));
    });
    for (const part of parts) part.hidden = !shown.has(Number(part.dataset.index));
    const count = `${bodies.length} run${bodies.length === 1 ? "" : "s"}`;
    find("#shown").textContent = shown.size === bodies.length ? count : `${shown.size} of ${count}`;
    find("#none").hidden = shown.size > 0;
    draw();
  }
  find("#filter").addEventListener("input", filter);
  find("#status").addEventListener("change", filter);

  // Picking: a picked run has its own colour and dash for as long as it is picked

  const drawable = new Set([...runs.keys()].filter((index) => runs[index].loss.length || runs[index].accuracy.length));
  const slots = new Map(), muted = new Set();
  const boxOf = (index) => find(".pick", bodies[index]);
  function pick(index, picked) {
    const free = [...Array(COLOURS * STYLES).keys()].find((slot) => ![...slots.values()].includes(slot));
    if (!picked) slots.delete(index);
    else if (!slots.has(index) && free !== undefined) slots.set(index, free);
    muted.delete(index);
    boxOf(index).checked = slots.has(index);
  }
  bodies.forEach((body, index) => {
    const box = find(".pick", body);
    box.disabled = !drawable.has(index);
    box.addEventListener("change", () => { pick(index, box.checked); draw(); });
  });
  const accuracy = (index) => Number(valueOf(bodies[index], "accuracy") || -1);
  const best = [...drawable].sort((a, b) => accuracy(b) - accuracy(a)).slice(0, PICKED_AT_FIRST);
  best.sort((a, b) => a - b).forEach((index) => pick(index, true));
  find("#pick-shown")?.addEventListener("click", () => {
    [...drawable].forEach((index) => pick(index, false));
    all("tbody.run").map((body) => Number(body.dataset.index)) // in their sorted order
      .filter((index) => shown.has(index) && drawable.has(index)).forEach((index) => pick(index, true));
    draw();
  });
  find("#pick-none")?.addEventListener("click", () => { [...drawable].forEach((index) => pick(index, false)); draw(); });

  // Charts

  function element(name, attributes, ...children) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }
  const look = (slot) => `c${slot % COLOURS} d${Math.floor(slot / COLOURS)}`;
  const inLine = (index) => slots.has(index) && shown.has(index) && !muted.has(index);

  function steps(low, high, count) { // round numbers from low to high
    const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9); at * step <= high + 1e-9 * step; at += 1) found.push(Number((at * step).toPrecision(12)));
    return found;
  }
  function decades(low, high) {
    const found = [], lowest = Math.floor(Math.log10(low)), highest = Math.ceil(Math.log10(high));
    const factors = highest - lowest > 3 ? [1] : [1, 2, 5], stride = Math.max(1, Math.ceil((highest - lowest) / 7));
    for (let power = lowest; power <= highest; power += stride)
      for (const factor of factors) found.push(factor * 10 ** power);
    const inside = found.filter((value) => value >= low && value <= high);
    return inside.length > 1 ? inside : steps(low, high, 4);
  }
  const written = (value) => {
    const size = Math.abs(value);
    if (size && (size >= 1e5 || size < 1e-3)) return value.toExponential().replace("e+", "e");
    return Number(value.toPrecision(6)).toLocaleString("en");
  };

  function chart(figure, key, { log, unit }) {
    const plot = find(".plot", figure), width = plot.clientWidth, height = plot.clientHeight;
    const usable = (y) => y !== null && (!log || y > 0);
    const candidates = [...shown].filter((index) => drawable.has(index) && !muted.has(index));
    const colored = candidates.filter((index) => slots.has(index));
    const points = candidates.flatMap((index) => {
      const pruned = key === "accuracy" && runs[index].pruned !== null ? [[0, runs[index].pruned]] : [];
      return [...runs[index][key], ...pruned].filter((point) => usable(point[1]));
    });
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": find("figcaption", figure).textContent });
    if (!points.length) {
      svg.append(element("text", { x: 0, y: 24, class: "empty" }, "Nothing to draw."));
      plot.replaceChildren(svg);
      return;
    }
    const xs = points.map((point) => point[0]), ys = points.map((point) => (log ? Math.log10(point[1]) : point[1]));
    const least = (values) => values.reduce((a, b) => Math.min(a, b)), most = (values) => values.reduce((a, b) => Math.max(a, b));
    const [left, right] = [least(xs), Math.max(most(xs), least(xs) + 1)];
    const margin = (most(ys) - least(ys)) * 0.06 || 0.5, [bottom, top] = [least(ys) - margin, most(ys) + margin];
    const ticks = log ? decades(10 ** bottom, 10 ** top) : steps(bottom, top, 5);
    const box = { left: 12 + 7 * Math.max(...ticks.map((tick) => written(tick).length)), right: width - 10, top: 8, bottom: height - 36 };
    const across = (x) => box.left + ((x - left) / (right - left)) * (box.right - box.left);
    const down = (y) => box.bottom - (((log ? Math.log10(y) : y) - bottom) / (top - bottom)) * (box.bottom - box.top);
    for (const tick of ticks) {
      svg.append(element("path", { class: "grid", d: `M${box.left} ${down(tick)}H${box.right}` }));
      svg.append(element("text", { x: box.left - 7, y: down(tick) + 4, "text-anchor": "end" }, written(tick)));
    }
    for (const tick of steps(left, right, Math.max(2, width / 110)))
      svg.append(element("text", { x: across(tick), y: box.bottom + 17, "text-anchor": "middle" }, written(tick)));
    svg.append(element("path", { class: "axis", d: `M${box.left} ${box.bottom}H${box.right}` }));
    svg.append(element("text", { x: box.right, y: height - 2, "text-anchor": "end" }, "matching step"));

    const line = (index) => {
      let pen = "M";
      return runs[index][key].map(([x, y]) => {
        if (!usable(y)) { pen = "M"; return ""; }
        const part = `${pen}${across(x).toFixed(1)} ${down(y).toFixed(1)}`;
        pen = "L";
        return part;
      }).join("");
    };
    for (const index of candidates.filter((index) => !slots.has(index))) svg.append(element("path", { class: "context", d: line(index) }));
    const targets = [];
    for (const index of colored) {
      const style = look(slots.get(index)), series = runs[index][key].filter((point) => usable(point[1]));
      svg.append(element("path", { class: `line ${style}`, "data-run": index, d: line(index) }));
      for (const [x, y] of series) {
        if (series.length <= 25) svg.append(element("circle", { class: `mark ${style}`, "data-run": index, cx: across(x), cy: down(y), r: 2.6 }));
        targets.push({ index, x: across(x), y: down(y), text: `step ${written(x)}: ${written(y)}${unit}` });
      }
      if (key === "accuracy" && runs[index].pruned !== null && series.length) {
        const x = across(series[series.length - 1][0]), y = down(runs[index].pruned);
        svg.append(element("rect", { class: `square ${style}`, "data-run": index, x: x - 4, y: y - 4, width: 8, height: 8 }));
        targets.push({ index, x, y, text: `pruned: ${written(runs[index].pruned)}${unit}` });
      }
    }
    const focus = element("circle", { class: "focus", r: 4.5, visibility: "hidden" });
    svg.append(focus);
    svg.addEventListener("pointermove", (event) => {
      const frame = svg.getBoundingClientRect(), x = event.clientX - frame.left, y = event.clientY - frame.top;
      let nearest = null, distance = 40;
      for (const target of targets) {
        const apart = Math.hypot(target.x - x, target.y - y);
        if (apart < distance) [nearest, distance] = [target, apart];
      }
      raise(nearest?.index);
      focus.setAttribute("visibility", nearest ? "visible" : "hidden");
      find("#tip").hidden = !nearest;
      if (!nearest) return;
      focus.setAttribute("cx", nearest.x);
      focus.setAttribute("cy", nearest.y);
      focus.setAttribute("class", `focus ${look(slots.get(nearest.index))}`);
      tell(`${runs[nearest.index].name} — ${nearest.text}`, frame.left + nearest.x, frame.top + nearest.y);
    });
    svg.addEventListener("pointerleave", () => {
      raise();
      focus.setAttribute("visibility", "hidden");
      find("#tip").hidden = true;
    });
    plot.replaceChildren(svg);
  }
  function tell(text, x, y) {
    const tip = find("#tip");
    tip.textContent = text;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(x + 14, room))}px`;
    tip.style.top = `${y > tip.offsetHeight + 24 ? y - tip.offsetHeight - 12 : y + 16}px`;
  }
  function raise(index) {
    for (const mark of all(".plot [data-run]")) {
      const own = Number(mark.dataset.run) === index;
      mark.classList.toggle("raised", own && mark.classList.contains("line"));
      mark.classList.toggle("faded", index !== undefined && !own);
    }
  }
  function legend() {
    const chips = [...slots.keys()].filter((index) => shown.has(index)).sort((a, b) => a - b).map((index) => {
      const chip = document.createElement("button"), swatch = element("svg", { viewBox: "0 0 22 10", "aria-hidden": "true" });
      swatch.append(element("path", { d: "M0 5H22", "stroke-width": 2.5, class: look(slots.get(index)) }));
      chip.type = "button";
      chip.setAttribute("aria-pressed", String(!muted.has(index)));
      chip.append(swatch, runs[index].name);
      chip.addEventListener("click", () => { if (!muted.delete(index)) muted.add(index); draw(); });
      chip.addEventListener("pointerenter", () => inLine(index) && raise(index));
      chip.addEventListener("pointerleave", () => raise());
      return chip;
    });
    find("#legend").replaceChildren(...chips);
  }
  function draw() {
    if (!find("#curves")) return;
    legend();
    if (find("#chart-accuracy")) chart(find("#chart-accuracy"), "accuracy", { log: false, unit: " %" });
    chart(find("#chart-loss"), "loss", { log: true, unit: "" });
  }

  // A link to a run opens its details; printing opens all of them

  function openTarget() {
    const target = document.getElementById(location.hash.slice(1));
    if (target?.matches("details")) { target.open = true; target.scrollIntoView(); }
  }
  addEventListener("hashchange", openTarget);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } }); // a phone's address bar changes only the height
  let opened = [];
  addEventListener("beforeprint", () => { opened = all("details:not([open])"); opened.forEach((one) => { one.open = true; }); });
  addEventListener("afterprint", () => opened.forEach((one) => { one.open = false; }));
  filter();
  openTarget();
})();
