/** What canvases and texts share: colours as the theme has them, the mel axis, times as people write them. */

import { FORMATS } from "./formats.js";
import { mel } from "./mel.js";

const PALETTE_SIZE = 8;

/** From paper to ink through blue and plum, as in the pictures of `htsat detect --plot`; from ink where it is dark. */
const SPECTRUM = {
  light: ["#f6f7f9", "#e3ebf4", "#b9d0e8", "#8aa6d6", "#6f78bf", "#5e4a9c", "#472770", "#220f3d"],
  dark: ["#1b1f28", "#272244", "#443074", "#5c50a8", "#6f7ec8", "#8db2e0", "#c3dcf1", "#fafcfe"],
};

/** A colour of the style sheet as `rgb(...)`. */
export function colour(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}
const probe = document.createElement("i");
probe.hidden = true;
document.documentElement.append(probe);

export const classToken = (rank) => `class-${rank % PALETTE_SIZE}`;

/** A colour with less than full strength. */
export const faint = (rgb, alpha) => rgb.replace(/^rgb\((.*)\)$/, `rgba($1, ${alpha})`);

export const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

/** 256 colours of the spectrogram, each [r, g, b] from 0 to 255. */
export function spectrumColours() {
  const stops = SPECTRUM[isDark() ? "dark" : "light"].map((hex) =>
    [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)),
  );
  return Array.from({ length: 256 }, (_, index) => {
    const place = (index / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    return [0, 1, 2].map((c) => Math.round(stops[low][c] + (stops[low + 1][c] - stops[low][c]) * (place - low)));
  });
}

/** Write round frequencies beside a mel spectrogram. */
export function labelFrequencies(axis, top, height, highest) {
  axis.replaceChildren();
  for (const hz of [250, 500, 1000, 2000, 4000, 8000, 16000]) {
    const y = top + height * (1 - mel(hz) / mel(highest));
    if (hz > highest || y < top + 6) continue;
    const tick = document.createElement("span");
    tick.textContent = hz < 1000 ? `${hz} Hz` : `${hz / 1000} kHz`;
    tick.style.top = `${y - 9}px`;
    tick.style.lineHeight = "18px";
    axis.append(tick);
  }
}

/** 0:07.4, 12:07, 1:02:07 */
export function clock(seconds, decimals = 0) {
  const unit = 10 ** decimals;
  const whole = decimals ? Math.round(seconds * unit) : Math.floor(seconds + 1e-6);
  const part = decimals ? `.${String(whole % unit).padStart(decimals, "0")}` : "";
  const total = Math.floor(whole / unit);
  const minutes = Math.floor(total / 60) % 60;
  const hours = Math.floor(total / 3600);
  const tail = `${String(total % 60).padStart(2, "0")}${part}`;
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${tail}` : `${minutes}:${tail}`;
}

/** 8.5 s, 3 min 20 s, 10 h 0 min */
export function spoken(seconds) {
  if (seconds < 60) return `${Number(seconds.toPrecision(3))} s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

export const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

/** A label as people read it. */
export const readable = (label) => label.replaceAll("_", " ");

/** An element with attributes and children. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (key === "onclick") element.addEventListener("click", value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** A coloured dot, the mark of a class. */
export function dot(token) {
  const mark = make("i", { class: "dot", "aria-hidden": "true" });
  mark.style.setProperty("--colour", `var(--${token})`);
  return mark;
}

/** An icon of the sprite in index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A canvas as large as its place, for crisp lines on any screen; returns its context, in CSS pixels. */
export function fit(canvas, width, height) {
  const ratio = Math.min(2, devicePixelRatio || 1);
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

/** Bars of tags, most probable first. */
export function showTags(list, tags, tokenOf) {
  // bars grow and shrink where they are as long as the labels stay
  tags.forEach(({ label, probability }, index) => {
    let item = list.children[index];
    if (!item) {
      item = make("div", { class: "tag", role: "listitem" }, make("span", {}, make("b"), make("em")), make("i"));
      item.querySelector("b").style.fontWeight = "500";
      list.append(item);
    }
    item.querySelector("b").textContent = readable(label);
    item.querySelector("em").textContent = probability.toFixed(2);
    item.querySelector("i").style.setProperty("--share", probability);
    const token = tokenOf(label);
    item.querySelector("i").style.setProperty("--colour", token ? `var(--${token})` : "var(--grey)");
  });
  while (list.children.length > tags.length) list.lastChild.remove();
}

/** A row of an event table. */
export function eventRow(event, onHear) {
  const times = `${clock(event.onset, 2)} – ${clock(event.offset, 2)}`;
  const label = readable(event.event_label);
  const row = make(
    "tr",
    { class: "event", "data-label": event.event_label },
    make("td", {}, make("button", { "aria-label": `Hear ${label}, ${times}` }, dot(event.token), label)),
    make("td", { class: "when" }, times),
    make("td", { class: "sure" }, event.probability.toFixed(2)),
  );
  row.style.setProperty("--colour", `var(--${event.token})`);
  if (onHear) row.addEventListener("click", onHear);
  return row;
}

/** A menu of the formats of downloads. */
export function saveMenu(list, onSave) {
  list.replaceChildren(
    ...Object.entries(FORMATS).map(([format, { name, about }]) =>
      make("button", { "data-format": format, onclick: () => onSave(format) }, name, make("small", {}, about)),
    ),
  );
}

/** An event in the row of its class: a tint over the row's height and a bar below the curve's baseline. */
export function drawEvent(context, rgb, tint, left, wide, top, rowHeight, baseline) {
  context.fillStyle = faint(rgb, tint);
  context.fillRect(left, top, wide, rowHeight - 1);
  context.fillStyle = rgb;
  context.beginPath();
  context.roundRect(left, baseline + 2, wide, 4, 2);
  context.fill();
}

/** A posterior over time, the highest of each pixel, so that no peak is lost: filled below, drawn on top. */
export function drawCurve(context, values, rgb, baseline, height) {
  context.beginPath();
  let open = -1;
  const close = (x) => {
    if (open < 0) return;
    context.lineTo(x, baseline);
    context.lineTo(open, baseline);
    open = -1;
  };
  values.forEach((value, x) => {
    if (Number.isNaN(value)) return close(x);
    if (open < 0) {
      open = x;
      context.moveTo(x, baseline);
    }
    context.lineTo(x, baseline - height * value);
    context.lineTo(x + 1, baseline - height * value);
  });
  close(values.length);
  context.fillStyle = faint(rgb, 0.2);
  context.fill();
  context.beginPath();
  let inside = false;
  values.forEach((value, x) => {
    if (Number.isNaN(value)) inside = false;
    else {
      const y = baseline - height * value;
      if (inside) context.lineTo(x, y);
      else context.moveTo(x, y);
      context.lineTo(x + 1, y);
      inside = true;
    }
  });
  context.strokeStyle = rgb;
  context.lineWidth = 1.3;
  context.lineJoin = "round";
  context.stroke();
}
