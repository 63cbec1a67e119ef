// Reads out the values of a plot under the pointer, or with the arrow keys when a plot has the focus.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const make = (name, attributes, parent) => {
    const element = document.createElementNS(SVG, name);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    return parent.appendChild(element);
  };
  const say = (value) => {
    if (value === null) return "–";
    const size = Math.abs(value);
    if (value !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2).replace("-", "−");
    return value.toLocaleString("en-US", { maximumFractionDigits: size >= 1000 ? 0 : size >= 10 ? 2 : 4 });
  };
  // the index of the step nearest to `step`
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle;
    }
    return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
  };

  // paper has no folds
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));

  for (const plot of document.querySelectorAll("svg.plot")) {
    let data = null, cursor = null, tip = null, rule = null, dots = [], shownStep = null;
    const figure = plot.closest("figure"), keys = figure.querySelectorAll(".legend svg");
    const prepare = () => {
      data = JSON.parse(document.getElementById(plot.dataset.plot + "-data").textContent);
      cursor = make("g", { class: "cursor" }, plot);
      rule = make("line", { y1: "0", y2: "100%" }, cursor);
      dots = data.lines.map((line) => make("circle", { r: 3.5, class: line.colour }, cursor));
      tip = figure.appendChild(document.createElement("div"));
      tip.className = "tip";
      tip.setAttribute("role", "status");
    };
    const scale = (step) => (data.log ? Math.log(step) : step);
    const across = (step) => (scale(step) - scale(data.x[0])) / (scale(data.x[1]) - scale(data.x[0]));
    const down = (value) => 1 - (value - data.y[0]) / (data.y[1] - data.y[0]);
    const show = (step) => {
      if (!data) prepare();
      const reach = 0.04;  // of the width: a line whose nearest point is farther has no value here
      const near = data.lines.map((line) => nearest(line.steps, step));
      const best = data.lines.reduce((found, line, i) =>
        Math.abs(line.steps[near[i]] - step) < Math.abs(found - step) ? line.steps[near[i]] : found, Infinity);
      if (!Number.isFinite(best)) return;
      shownStep = best;
      cursor.style.display = tip.style.display = "";
      const at = 100 * across(best) + "%";
      rule.setAttribute("x1", at);
      rule.setAttribute("x2", at);
      const table = document.createElement("table");
      table.createCaption().textContent = data.across + " " + best.toLocaleString("en-US");
      data.lines.forEach((line, i) => {
        const index = nearest(line.steps, best), there = line.steps[index], value = line.values[index];
        const visible = value !== null && Math.abs(across(there) - across(best)) <= reach;
        dots[i].style.display = visible ? "" : "none";
        if (!visible) return;
        dots[i].setAttribute("cx", 100 * across(there) + "%");
        dots[i].setAttribute("cy", 100 * down(value) + "%");
        const row = table.insertRow(), name = row.insertCell();
        if (keys[i]) name.appendChild(keys[i].cloneNode(true));
        // a line without a point at this step shows the nearest one it has, and says which
        const where = there === best ? "" : " (" + data.across + " " + there.toLocaleString("en-US") + ")";
        name.appendChild(document.createElement("span")).textContent = line.label + where;
        row.insertCell().textContent = say(value);
      });
      tip.replaceChildren(table);
      const box = plot.getBoundingClientRect(), frame = figure.getBoundingClientRect();
      const x = box.left - frame.left + across(best) * box.width;
      const left = x + 14 + tip.offsetWidth > frame.width ? x - 14 - tip.offsetWidth : x + 14;
      tip.style.left = Math.max(4, left) + "px";
      tip.style.top = box.top - frame.top + 4 + "px";
    };
    const hide = () => {
      if (data) cursor.style.display = tip.style.display = "none";
      shownStep = null;
    };
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      if (!data) prepare();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      const at = scale(data.x[0]) + share * (scale(data.x[1]) - scale(data.x[0]));
      show(data.log ? Math.exp(at) : at);
    });
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const direction = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") hide();
      if (!direction) return;
      event.preventDefault();
      if (!data) prepare();
      const steps = data.lines.reduce((longest, line) => (line.steps.length > longest.length ? line.steps : longest), []);
      const next = shownStep === null ? (direction > 0 ? 0 : steps.length - 1) : nearest(steps, shownStep) + direction;
      show(steps[Math.min(steps.length - 1, Math.max(0, next))]);
    });
  }
})();
