/**
 * The microphone, heard as it happens: rolling spectrogram, posteriors and events over the WebSocket.
 *
 * The page has one time line, in seconds of the microphone's clock since listening began. A connection has its own,
 * from its first sample on; `base` is where that lies on the page's.
 */

import { models, streamAddress } from "./api.js";
import { FORMATS, download } from "./formats.js";
import {
  classToken,
  clock,
  colour,
  counted,
  dot,
  drawCurve,
  drawEvent,
  eventRow,
  fit,
  icon,
  labelFrequencies,
  make,
  readable,
  saveMenu,
  showTags,
  spectrumColours,
} from "./look.js";
import { hertz, mel } from "./mel.js";
import { level, openMicrophone, toPcm } from "./microphone.js";

const element = (id) => document.getElementById(id);

/** Seconds in view, columns of the spectrogram per second, its rows, its highest frequency. */
const SPAN = () => (innerWidth < 860 ? 15 : 30);
const COLUMNS_PER_SECOND = 40;
const BANDS = 128;
const HIGHEST = 16000;
const HEIGHT = () => (innerWidth < 860 ? 190 : Math.max(240, Math.min(420, innerHeight - 520)));
const MAX_ROWS = 6;
/** Classes without events are shown too: so many, from this posterior on. */
const MAX_OTHERS = 3;
const LEAST_PEAK = 0.3;
const MAX_LOG = 500;
/** Bytes that may wait to be sent; what comes on top is left out, and the server is told. */
const MAX_WAITING = 400_000;
const BACK_OFF = [0.5, 1, 2, 4, 8, 15];
/** Close codes after which it is no use to try again. */
const FINAL = [1003, 1007, 1008, 1009];

export class LiveView {
  /** @param {{model: () => object, settings: () => {point: string | null}}} page what is chosen there. */
  constructor(page) {
    this.page = page;
    this.running = false;
    this.events = new Map();
    this.log = [];
    this.ranks = new Map();
    this.frames = [];
    this.labels = [];
    this.first = this.next = null;
    element("live-toggle").addEventListener("click", () => (this.running ? this.stop() : this.start()));
    saveMenu(element("live-save-list"), (format) => this.save(format));
    new ResizeObserver(() => this.resize()).observe(element("live-spectrogram").parentElement);
    this.restyle();
  }

  async start() {
    if (this.running) return;
    this.running = true;
    this.notify("");
    this.reset();
    this.showState("opening");
    try {
      this.microphone = await openMicrophone(
        (block) => this.take(block),
        () => this.stop("The microphone was disconnected. Connect it and start again."),
      );
    } catch (error) {
      this.running = false;
      this.showState("idle");
      this.notify(error.message);
      return;
    }
    if (!this.running) return this.microphone.stop();
    this.connect();
    this.bins = this.binsOf(this.microphone);
    this.loop = requestAnimationFrame(() => this.draw());
  }

  stop(reason = "") {
    if (!this.running) return;
    this.running = false;
    clearTimeout(this.retry);
    cancelAnimationFrame(this.loop);
    this.microphone?.stop();
    this.closeEvents();
    if (this.socket?.readyState === WebSocket.OPEN) {
      // what is still on its way comes back before the server closes
      this.socket.send('{"type":"end"}');
      const { socket } = this;
      setTimeout(() => socket.close(), 3000);
    } else this.socket?.close();
    this.showState("idle");
    this.notify(reason);
    element("live-level").value = -60;
  }

  reset() {
    this.first = null;
    this.next = null;
    this.known = 0;
    this.silentFrom = undefined;
    this.base = null;
    this.attempt = 0;
    this.events.clear();
    this.ranks.clear();
    this.log = [];
    this.frames = [];
    this.labels = [];
    this.ring = new Uint8Array(SPAN() * COLUMNS_PER_SECOND * BANDS);
    this.column = 0;
    element("log").tBodies[0].replaceChildren();
    element("live-tags").replaceChildren();
    element("live-delay").textContent = "–";
    this.countLog();
    this.rollColours();
  }

  // --- to the server ------------------------------------------------------------------------

  connect() {
    const { sampleRate } = this.microphone;
    const query = {
      model: this.page.model()?.name,
      sample_rate: sampleRate,
      format: "s16le",
      hop: 1,
      frames: true,
      top: 5,
      max_delay: 10,
    };
    const socket = new WebSocket(streamAddress({ ...query, operating_point: this.page.settings().point }));
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    this.base = null;
    this.lost = 0;
    let problem = "";
    let opened = false;
    socket.onopen = () => {
      opened = true;
      this.base = this.time;
    };
    socket.onmessage = ({ data }) => {
      const message = JSON.parse(data);
      if (message.type === "error") problem = message.message;
      else if (socket === this.socket) this.receive(message);
    };
    socket.onclose = async ({ code, reason }) => {
      if (socket !== this.socket || !this.running) return;
      this.closeEvents();
      // a browser does not tell why it was not let in; if a token is missing, asking for the models asks for it
      if (!opened) await models().catch(() => {});
      if (!this.running) return;
      if (FINAL.includes(code)) return this.stop(problem || reason || `The server ended the stream (${code}).`);
      const wait = BACK_OFF[Math.min(this.attempt++, BACK_OFF.length - 1)];
      this.showState("waiting");
      const why = problem || reason || (opened ? "The connection was lost" : "The server cannot be reached");
      this.notify(`${why.replace(/\.$/, "")}; trying again. What sounds meanwhile is not heard.`);
      this.silentFrom ??= this.known;
      this.retry = setTimeout(() => this.running && this.connect(), wait * 1000);
    };
  }

  /** A block of the microphone. */
  take({ start, samples }) {
    const { sampleRate } = this.microphone;
    this.first ??= start;
    const missing = this.next === null ? 0 : start - this.next;
    this.next = start + samples.length;
    element("live-level").value = level(samples);
    element("live-time").textContent = clock(this.time);
    const { socket } = this;
    if (socket?.readyState !== WebSocket.OPEN || this.base === null) return;
    // a stumble of the audio system is silence; more than that is a gap
    if (missing > sampleRate / 10) this.lost += missing / sampleRate;
    else if (missing > 0) socket.send(new Int16Array(missing));
    if (socket.bufferedAmount > MAX_WAITING) {
      this.lost += samples.length / sampleRate;
      return;
    }
    if (this.lost > 0) {
      socket.send(JSON.stringify({ type: "gap", seconds: this.lost }));
      this.lost = 0;
    }
    socket.send(toPcm(samples));
  }

  /** Seconds that the microphone has given. */
  get time() {
    return this.next === null ? 0 : (this.next - this.first) / this.microphone.sampleRate;
  }

  // --- from the server ----------------------------------------------------------------------

  receive(message) {
    if (message.type === "start") {
      this.labels = message.labels;
      this.attempt = 0;
      this.notify("");
      this.showState("listening");
      if (this.silentFrom !== undefined) this.logGap(this.silentFrom, this.base - this.silentFrom);
      this.silentFrom = undefined;
    } else if (message.type === "event") this.receiveEvent(message);
    else if (message.type === "progress") {
      // how long the oldest of the sound that is told now has waited
      const delay = this.time - Math.max(this.known, this.base);
      this.known = this.base + message.time;
      element("live-delay").textContent = `${Math.max(0, delay).toFixed(1)} s`;
      showTags(element("live-tags"), message.tags, (label) => (this.ranks.has(label) ? this.tokenOf(label) : null));
    } else if (message.type === "frames") {
      this.frames.push({ start: this.base + message.start, step: message.frame_seconds, rows: message.posteriors });
      while (this.frames.length && this.frames[0].start < this.time - SPAN() - 5) this.frames.shift();
    } else if (message.type === "gap") this.logGap(this.base + message.start, message.duration);
  }

  tokenOf(label) {
    if (!this.ranks.has(label)) this.ranks.set(label, this.ranks.size);
    return classToken(this.ranks.get(label));
  }

  receiveEvent({ state, id, event_label: label, onset, offset, probability }) {
    const key = `${this.base} ${id}`;
    const known = this.events.get(key);
    const event = known ?? { event_label: label, token: this.tokenOf(label), row: null };
    Object.assign(event, {
      onset: this.base + onset,
      offset: this.base + offset,
      probability,
      open: state !== "close",
    });
    const row = eventRow(event, null);
    row.querySelector("button").replaceWith(make("span", { class: "heard" }, dot(event.token), readable(label)));
    if (event.row) event.row.replaceWith(row);
    else element("log").tBodies[0].prepend(row);
    event.row = row;
    this.showOpen(event);
    if (!known) {
      this.events.set(key, event);
      this.log.push(event);
      const { rows } = element("log").tBodies[0];
      while (rows.length > MAX_LOG) rows[rows.length - 1].remove();
    }
    this.countLog();
  }

  /** The connection is gone: what was open ends where it was last heard. */
  closeEvents() {
    for (const event of this.events.values()) {
      if (!event.open) continue;
      event.open = false;
      this.showOpen(event);
    }
  }

  /** Whether an event is still going on. */
  showOpen({ row, open, onset, offset }) {
    row.classList.toggle("open", open);
    row.querySelector(".when").textContent = `${clock(onset, 1)} – ${open ? "" : clock(offset, 1)}`;
  }

  logGap(start, duration) {
    if (duration <= 0) return;
    const text = `${clock(start, 1)}: ${duration.toFixed(1)} s not heard`;
    element("log").tBodies[0].prepend(make("tr", { class: "event gap" }, make("td", { colspan: 3 }, text)));
  }

  countLog() {
    element("live-count").textContent = this.log.length || "";
    element("log-none").hidden = element("log").tBodies[0].rows.length > 0;
    element("live-save").hidden = !this.log.length;
  }

  save(format) {
    const { write, ending, type } = FORMATS[format];
    const events = [...this.log].sort((a, b) => a.onset - b.onset);
    download(`live${ending}`, write([{ file: "live", duration: this.time, events }]), type);
    element("live-save").open = false;
  }

  // --- on the page --------------------------------------------------------------------------

  notify(text) {
    const notice = element("live-notice");
    notice.hidden = !text;
    notice.replaceChildren(...(text ? [icon("warn"), make("p", {}, text)] : []));
  }

  showState(name) {
    const button = element("live-toggle");
    button.dataset.state = name;
    button.replaceChildren(
      icon(this.running ? "stop" : "mic"),
      make("span", {}, this.running ? "Stop" : "Start listening"),
    );
    const titles = {
      idle: "Listen to the microphone",
      opening: "Opening the microphone…",
      waiting: "Connecting again…",
      listening: "Listening",
    };
    element("live-title").textContent = titles[name];
    element("live-facts").textContent =
      name === "listening"
        ? this.microphone.name || "Microphone"
        : name === "idle" && this.log.length
          ? `${counted(this.log.length, "event")} heard`
          : "Sounds appear as they are heard. Nothing is stored.";
  }

  /** The bins of the spectrum that each row of the picture shows. */
  binsOf({ analyser, sampleRate }) {
    const width = sampleRate / analyser.fftSize;
    const top = mel(Math.min(HIGHEST, sampleRate / 2));
    return Array.from({ length: BANDS }, (_, band) => {
      const low = hertz((band / BANDS) * top) / width;
      const high = hertz(((band + 1) / BANDS) * top) / width;
      const first = Math.round(low);
      return [first, Math.max(first + 1, Math.min(analyser.frequencyBinCount, Math.round(high)))];
    });
  }

  draw() {
    if (!this.running) return;
    this.loop = requestAnimationFrame(() => this.draw());
    if (element("live").hidden) return;
    this.roll();
    this.drawSpectrogram();
    this.drawTracks();
  }

  /** Seconds since the first block; runs on between blocks. */
  get now() {
    const { time } = this;
    if (time !== this.stamp?.time) this.stamp = { time, at: performance.now() };
    return time + Math.min(0.25, (performance.now() - this.stamp.at) / 1000);
  }

  /** Put what the microphone hears now into the picture. */
  roll() {
    const due = Math.floor(this.now * COLUMNS_PER_SECOND);
    const count = this.ring.length / BANDS;
    if (due <= this.column) return;
    const { analyser } = this.microphone;
    this.spectrum ??= new Float32Array(analyser.frequencyBinCount);
    analyser.getFloatFrequencyData(this.spectrum);
    const column = new Uint8Array(BANDS);
    let loudest = -120;
    this.bins.forEach(([first, last], band) => {
      let highest = -140;
      for (let bin = first; bin < last; bin++) highest = Math.max(highest, this.spectrum[bin]);
      loudest = Math.max(loudest, highest);
      column[band] = Math.max(0, Math.min(255, ((highest - this.floor) / 62) * 255));
    });
    // colours follow the loudness slowly, so that a quiet room and a loud street both show
    const wanted = Math.max(-118, Math.min(-72, loudest - 58));
    this.floor += (wanted - this.floor) * (wanted > this.floor ? 0.05 : 0.003);
    // a hidden page draws nothing for a while: those columns stay empty
    const from = Math.max(this.column, due - count);
    for (let c = from; c < due; c++) {
      const place = c % count;
      if (due - c > 12) this.ring.fill(0, place * BANDS, (place + 1) * BANDS);
      else this.ring.set(column, place * BANDS);
      this.paint(place);
    }
    this.column = due;
  }

  /** One column of the ring into the bitmap. */
  paint(place) {
    const count = this.ring.length / BANDS;
    for (let band = 0; band < BANDS; band++) {
      const at = 4 * ((BANDS - 1 - band) * count + place);
      const [r, g, b] = this.colours[this.ring[place * BANDS + band]];
      this.pixels.data.set([r, g, b, 255], at);
    }
    this.dirty = true;
  }

  rollColours() {
    this.colours = spectrumColours();
    this.floor ??= -105;
    if (!this.ring) return;
    const count = this.ring.length / BANDS;
    this.pixels = new ImageData(count, BANDS);
    this.bitmap = new OffscreenCanvas(count, BANDS);
    for (let place = 0; place < count; place++) this.paint(place);
  }

  drawSpectrogram() {
    const canvas = element("live-spectrogram");
    const width = canvas.parentElement.clientWidth;
    const height = HEIGHT();
    const context = fit(canvas, width, height);
    if (!this.ring) return;
    if (this.dirty) this.bitmap.getContext("2d").putImageData(this.pixels, 0, 0);
    this.dirty = false;
    const count = this.ring.length / BANDS;
    const cut = this.column % count;
    const x = (columns) => (columns / count) * width;
    context.imageSmoothingEnabled = true;
    // the oldest column lies right of the newest in the ring
    context.drawImage(this.bitmap, cut, 0, count - cut, BANDS, 0, 0, x(count - cut), height);
    if (cut) context.drawImage(this.bitmap, 0, 0, cut, BANDS, x(count - cut), 0, x(cut), height);
  }

  /** Classes to show: those with events in view, then the most probable others; each keeps its place. */
  rowsOf(recent) {
    const peaks = new Map();
    for (const { rows } of this.frames) {
      for (const row of rows) {
        row.forEach((value, column) => {
          if (value > (peaks.get(column) ?? LEAST_PEAK)) peaks.set(column, value);
        });
      }
    }
    const others = [...peaks.keys()].sort((a, b) => peaks.get(b) - peaks.get(a)).slice(0, MAX_OTHERS);
    const chosen = new Set([
      ...recent.map((event) => event.event_label),
      ...others.map((column) => this.labels[column]),
    ]);
    const labels = [...chosen].slice(0, MAX_ROWS);
    labels.forEach((label) => this.tokenOf(label));
    return labels.sort((a, b) => this.ranks.get(a) - this.ranks.get(b));
  }

  drawTracks() {
    const span = SPAN();
    const to = this.running ? this.now : this.time;
    const from = to - span;
    // what is out of view is in the log alone: listening may go on for weeks
    for (const [key, event] of this.events) if (!event.open && event.offset < from - 5) this.events.delete(key);
    const recent = [...this.events.values()].filter((event) => (event.open ? to : event.offset) > from);
    const labels = this.rowsOf(recent);
    const names = element("live-names");
    if (names.dataset.labels !== labels.join("\n")) {
      names.dataset.labels = labels.join("\n");
      names.replaceChildren(
        ...labels.map((label) =>
          make("div", { class: "name" }, dot(this.tokenOf(label)), make("span", {}, readable(label))),
        ),
      );
    }
    const canvas = element("live-tracks");
    const width = canvas.parentElement.clientWidth;
    const rowHeight = parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row"));
    const context = fit(canvas, width, Math.max(3, labels.length) * rowHeight + 22);
    const x = (seconds) => ((seconds - from) / span) * width;
    const grey = colour("grey");
    const floor = Math.max(3, labels.length) * rowHeight;
    context.font = '11px "Inter", sans-serif';
    context.fillStyle = grey;
    for (let ago = 0; ago <= span; ago += 5) {
      const at = width - (ago / span) * width;
      context.textAlign = ago === 0 ? "right" : ago === span ? "left" : "center";
      context.fillText(ago ? `−${ago} s` : "now", ago === 0 ? at - 8 : ago === span ? at + 8 : at, floor + 14);
      context.fillRect(at, floor, 1, 3);
    }
    labels.forEach((label, index) => {
      const top = index * rowHeight;
      const baseline = top + rowHeight - 8;
      const rgb = colour(this.tokenOf(label));
      for (const event of recent) {
        if (event.event_label !== label) continue;
        const left = x(event.onset);
        const wide = Math.max(3, x(event.offset) - left);
        drawEvent(context, rgb, 0.12, left, wide, top, rowHeight, baseline);
      }
      const values = new Array(Math.floor(width)).fill(NaN);
      const column = this.labels.indexOf(label);
      for (const { start, step, rows } of this.frames) {
        rows.forEach((row, frame) => {
          const first = Math.max(0, Math.floor(x(start + frame * step)));
          const last = Math.min(values.length - 1, Math.ceil(x(start + (frame + 1) * step)) - 1);
          for (let pixel = first; pixel <= last; pixel++)
            values[pixel] = Math.max(Number.isNaN(values[pixel]) ? 0 : values[pixel], row[column]);
        });
      }
      drawCurve(context, values, rgb, baseline, rowHeight - 14);
      if (index) {
        context.fillStyle = colour("rule");
        context.fillRect(0, top, width, 1);
      }
    });
  }

  resize() {
    labelFrequencies(element("live-frequencies"), 0, HEIGHT(), HIGHEST);
    this.drawSpectrogram();
    this.drawTracks();
  }

  restyle() {
    this.rollColours();
    this.drawSpectrogram();
    this.drawTracks();
  }
}
