"use strict";
(() => {
  const root = document.documentElement;
  const island = JSON.parse(document.getElementById("island").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  root.classList.add("js");

  // Colours in figures are names of the page's own, so that charts follow it from light to dark.
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const themed = (value) => {
    if (typeof value === "string") {
      return value.replace(/^var\((--[a-z-]+)\)$/, (_, name) => colour(name));
    }
    if (Array.isArray(value)) return value.map(themed);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, themed(inner)]));
  };

  const axis = (own) => ({
    fixedrange: true, automargin: true, zeroline: false, gridcolor: colour("--line"),
    linecolor: colour("--line"), ...own,
    title: { standoff: 8, font: { size: 12, color: colour("--muted") }, ...(own || {}).title },
  });
  const layoutOf = (figure) => {
    const own = themed(figure.layout);
    return {
      margin: { l: 8, r: 8, t: 8, b: 8 }, dragmode: false,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--muted") },
      hoverlabel: {
        bgcolor: colour("--surface"), bordercolor: colour("--line"), font: { color: colour("--ink") },
      },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: colour("--ink") } },
      ...own, xaxis: axis(own.xaxis), yaxis: axis(own.yaxis),
    };
  };
  const settings = { displayModeBar: false, responsive: true, showTips: false };

  const drawn = new Set();
  const draw = (element) => {
    const figure = island.figures[element.dataset.figure];
    const first = !drawn.has(element);
    drawn.add(element);
    const done = Plotly.react(element, themed(figure.data), layoutOf(figure), settings);
    if (first && element.classList.contains("clouds")) done.then(() => watchCloud(element));
    return done.then(() => placeNames(element));
  };
  // Names of marks go where they hide least: another name, a mark, or nothing of theirs outside.
  const placeNames = (element) => {
    const { xaxis, yaxis, annotations = [] } = element._fullLayout;
    const brush = document.createElement("canvas").getContext("2d");
    brush.font = getComputedStyle(document.body).font.replace(/[\d.]+px/, "12px");
    const names = annotations.map((note, index) => ({ index, note, x: xaxis.d2p(note.x), y: yaxis.d2p(note.y) }))
      .filter(({ note }) => note.text);
    const around = (x, y, size, weight) => [x - size / 2, y - size / 2, x + size / 2, y + size / 2, weight];
    const taken = element.data.filter(({ mode }) => mode === "markers").flatMap(({ x, y, marker }) =>
      x.map((across, index) => around(xaxis.d2p(across), yaxis.d2p(y[index]), marker.size, 4)));
    annotations.filter(({ showarrow }) => showarrow).forEach(({ x, y, ax, ay }) => {
      for (let part = 0; part < 1; part += 0.04) {
        taken.push(around(xaxis.d2p(x + part * (ax - x)), yaxis.d2p(y + part * (ay - y)), 5, 1));
      }
    });
    const shared = (a, b) => Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) *
      Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
    const places = {};
    names.forEach(({ index, note, x, y }) => {
      const width = brush.measureText(note.text).width + 4, spots = [];
      const frame = [0, 0, xaxis._length, yaxis._length];
      for (let yshift = -75; yshift <= 75; yshift += 15) {
        for (const [xanchor, xshift] of [["left", 9], ["right", -9], ["center", 0]]) {
          const left = x + xshift - { left: 0, right: width, center: width / 2 }[xanchor];
          const box = [left, y - yshift - 8, left + width, y - yshift + 8];
          const hidden = taken.reduce((sum, other) => sum + other[4] * shared(box, other), 0);
          const outside = width * 16 - shared(box, frame);
          spots.push({ cost: hidden + 3 * outside + 2.5 * Math.abs(yshift) + (xanchor === "left" ? 0 : 4), box, xanchor, xshift, yshift });
        }
      }
      const best = spots.reduce((a, b) => (b.cost < a.cost ? b : a));
      taken.push([...best.box, 1]);
      for (const key of ["xanchor", "xshift", "yshift"]) places[`annotations[${index}].${key}`] = best[key];
    });
    if (names.length) return Plotly.relayout(element, places);
  };
  const drawVisible = () => {
    if (!window.Plotly) return;
    document.querySelectorAll(".plot").forEach((element) => {
      if (!drawn.has(element) && element.offsetParent !== null) draw(element);
    });
  };
  const redraw = () => drawn.forEach((element) => { if (element.offsetParent !== null) draw(element); else { drawn.delete(element); } });

  // plotly.js travels compressed, which makes the file half as large.
  const unpack = async () => {
    const packed = atob(document.getElementById("plotly").textContent.trim());
    const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    drawVisible();
    root.dataset.ready = "true";
  };

  // A pair in both clouds, and what it is.
  const card = document.getElementById("pair");
  const showPair = (index) => {
    document.querySelectorAll(".plot.clouds").forEach((element) => {
      const [images, texts] = element.data;
      const ends = { x: [[images.x[index], texts.x[index]]], y: [[images.y[index], texts.y[index]]] };
      Plotly.restyle(element, ends, [3]);
    });
    const pair = island.pairs[index];
    const thumbnail = island.thumbnails[pair.image];
    const image = card.querySelector("img");
    card.querySelector(".hint").hidden = true;
    card.querySelector(".about").hidden = false;
    image.hidden = !thumbnail;
    if (thumbnail) image.src = `data:image/jpeg;base64,${thumbnail}`;
    image.alt = pair.name;
    card.querySelector(".caption").textContent = pair.caption;
    card.querySelector(".facts").textContent =
      `cosine ${pair.cosine_before.toFixed(3)} → ${pair.cosine_after.toFixed(3)} · ` +
      `own caption at rank ${pair.rank_before} → ${pair.rank_after}`;
    card.dataset.pair = String(index);
  };
  const watchCloud = (element) => {
    const show = (event) => {
      const point = event.points[0];
      if (point.curveNumber < 2) showPair(point.pointIndex);
    };
    element.on("plotly_hover", show);
    element.on("plotly_click", show);
  };

  // One part of the report at a time.
  const tabs = [...document.querySelectorAll('[role="tab"]')];
  const open = (tab, focus) => {
    tabs.forEach((other) => {
      const selected = other === tab;
      other.setAttribute("aria-selected", String(selected));
      other.tabIndex = selected ? 0 : -1;
      document.getElementById(other.getAttribute("aria-controls")).hidden = !selected;
    });
    if (focus) tab.focus();
    drawVisible();
    hintAtMore();
  };
  const hintAtMore = () => document.querySelectorAll(".wide").forEach((table) => {
    table.classList.toggle("scrolls", table.scrollWidth > table.clientWidth);
  });
  document.querySelectorAll("details").forEach((part) => part.addEventListener("toggle", hintAtMore));
  tabs.forEach((tab, position) => {
    tab.addEventListener("click", () => {
      open(tab);
      history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
    });
    tab.addEventListener("keydown", (event) => {
      const moves = { ArrowRight: position + 1, ArrowLeft: position - 1, Home: 0, End: tabs.length - 1 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      open(tabs[(moves[event.key] + tabs.length) % tabs.length], true);
    });
  });
  const wanted = tabs.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash);
  if (tabs.length) open(wanted || tabs[0]);

  document.getElementById("theme").addEventListener("click", () => {
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    redraw();
  });
  dark.addEventListener("change", redraw);
  addEventListener("resize", () => { hintAtMore(); redraw(); });

  unpack().catch(() => {
    root.dataset.ready = "failed";
    document.querySelectorAll(".plot").forEach((element) => {
      element.textContent = "This browser cannot draw the chart; its numbers are in the table below.";
      element.style.height = "auto";
    });
  });
})();
