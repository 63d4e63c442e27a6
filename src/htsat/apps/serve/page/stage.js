/**
 * One recording on one time axis: waveform, spectrogram and posteriors, with its events, to look at and to play.
 *
 * wavesurfer.js draws the upper part, scrolls and plays; the posteriors below follow its scrolling. What is costly is
 * drawn for the visible stretch alone, so an hour is as quick as a minute.
 */

import WaveSurfer from "./vendor/wavesurfer.esm.js";
import RegionsPlugin from "./vendor/regions.esm.js";
import SpectrogramPlugin from "./vendor/spectrogram.esm.js";
import TimelinePlugin from "./vendor/timeline.esm.js";
import {
  clock,
  colour,
  dot,
  drawCurve,
  drawEvent,
  faint,
  fit,
  icon,
  labelFrequencies,
  make,
  readable,
  spectrumColours,
} from "./look.js";

const WAVE_HEIGHT = 116;
const HEAD_HEIGHT = 19;
const SPECTROGRAM_HEIGHT = 176;
const TIMELINE_HEIGHT = 24;
const FFT_SIZE = 1024;
/** Seconds up to which the plugin makes the whole spectrogram; beyond, a worker makes that of what is in view. */
const WHOLE = 180;
const BANDS = 128;
const RANGE = 62;
/** Seconds whose samples are decoded to be drawn; a longer recording is played and analysed all the same. */
const DRAWN = (navigator.deviceMemory ?? 8) >= 8 ? 3 * 3600 : 1800;
/** Regions on the waveform at once; beyond, events are seen on the posteriors below and in the table. */
const MAX_REGIONS = 120;
/** Pixels per second, and pixels in all. */
const MAX_ZOOM = 400;
const MAX_WIDTH = 200_000;
/** Seconds between the times that are written out. */
const TIME_STEPS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600];

const element = (id) => document.getElementById(id);
const nextFrame = () => new Promise((resolve) => requestAnimationFrame(resolve));

/** Samples for drawing: one channel, at a rate that the length of the recording allows. */
async function samplesOf(file, duration) {
  const rate = duration <= 900 ? 32000 : duration <= 1800 ? 16000 : 8000;
  const context = new OfflineAudioContext(1, 1, rate);
  const buffer = await context.decodeAudioData(await file.arrayBuffer());
  const mono = buffer.getChannelData(0);
  for (let channel = 1; channel < buffer.numberOfChannels; channel++) {
    const other = buffer.getChannelData(channel);
    for (let i = 0; i < mono.length; i++) mono[i] += other[i];
  }
  if (buffer.numberOfChannels > 1) for (let i = 0; i < mono.length; i++) mono[i] /= buffer.numberOfChannels;
  return { mono, duration: buffer.duration, rate };
}

/** How loud a loud bin is, in dB as the spectrogram counts them: colours then fit quiet and loud recordings alike. */
function loudness(mono) {
  const blocks = [];
  const count = Math.min(400, Math.max(1, Math.floor(mono.length / FFT_SIZE)));
  for (let block = 0; block < count; block++) {
    const start = Math.floor((block / count) * Math.max(0, mono.length - FFT_SIZE));
    let power = 0;
    for (let i = start; i < start + FFT_SIZE && i < mono.length; i++) power += mono[i] * mono[i];
    blocks.push(power / FFT_SIZE);
  }
  blocks.sort((a, b) => a - b);
  return 10 * Math.log10(blocks[Math.floor(blocks.length * 0.97)] + 1e-10);
}

export class Stage {
  /**
   * @param {{onSelect: (event: object) => void, onTime: (seconds: number) => void,
   *   onName: (label: string) => void}} hooks an event was clicked; the play position moved; a class was clicked.
   */
  constructor(hooks) {
    this.hooks = hooks;
    this.item = null;
    this.events = [];
    this.rows = [];
    this.surfer = null;
    this.end = null;
    this.view = [0, 1];
    const audio = element("audio");
    for (const name of ["play", "pause", "ended"]) audio.addEventListener(name, () => this.showPlaying());
    audio.addEventListener("timeupdate", () => this.stopAtEnd());
    element("play").addEventListener("click", () => this.playPause());
    element("zoom").addEventListener("input", () => this.zoom(Number(element("zoom").value)));
    element("posteriors").addEventListener("click", (event) => this.clickTracks(event));
    element("wave").addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    element("tracks").addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    new ResizeObserver(() => this.follow()).observe(element("tracks"));
  }

  get duration() {
    return this.surfer?.getDuration() || this.item?.result?.duration || 0;
  }

  get time() {
    return element("audio").currentTime;
  }

  get sounding() {
    return !element("audio").paused;
  }

  /** Show another recording, or none. */
  async show(item) {
    this.close();
    this.item = item;
    if (!item) return;
    this.controls = new AbortController();
    const { signal } = this.controls;
    const audio = element("audio");
    item.playable = item.drawable = undefined;
    item.address ??= URL.createObjectURL(item.file);
    audio.src = item.address;
    const length = await new Promise((resolve) => {
      audio.addEventListener("loadedmetadata", () => resolve(audio.duration), { once: true, signal });
      audio.addEventListener("error", () => resolve(null), { once: true, signal });
      signal.addEventListener("abort", () => resolve(null));
    });
    if (signal.aborted) return;
    item.playable = length !== null;
    let samples = null;
    if (item.playable && !(length > DRAWN)) {
      try {
        samples = await samplesOf(item.file, Number.isFinite(length) ? length : 0);
      } catch {
        samples = null; // it plays but cannot be decoded at once: no picture
      }
      if (signal.aborted) return;
      if (samples) samples.loud = loudness(samples.mono);
    }
    item.drawable = samples !== null;
    if (samples?.duration > WHOLE) samples.peaks = await this.overview(samples);
    if (signal.aborted) return;
    this.open(samples, samples?.duration ?? length);
  }

  /** Make the picture; without samples an empty one on the axis of the result. */
  open(samples, length) {
    const { item } = this;
    const duration = Number.isFinite(length) ? length : item.result?.duration;
    // open already, or neither the browser nor yet the server knows the recording
    if (this.surfer || !duration) return;
    this.samples = samples;
    this.regions = RegionsPlugin.create();
    const surfer = WaveSurfer.create({
      container: element("wave"),
      height: WAVE_HEIGHT,
      ...this.colours(),
      cursorWidth: 1,
      barWidth: 2,
      barGap: 1,
      barRadius: 2,
      normalize: true,
      dragToSeek: true,
      autoCenter: false,
      minPxPerSec: 0,
      media: element("audio"),
      // the samples are at hand: nothing is to be fetched
      url: item.playable ? item.address : "",
      peaks: [samples ? (samples.peaks ?? samples.mono) : new Float32Array(2)],
      duration,
      plugins: [this.regions],
    });
    this.surfer = surfer;
    this.drawSpectrogram();
    surfer.on("ready", () => {
      element("wave").dataset.ready = "true";
      this.follow();
      this.setEvents(this.events);
      this.tick();
    });
    surfer.on("interaction", () => (this.end = null));
    surfer.on("scroll", () => this.follow());
    surfer.on("redraw", () => this.follow());
    surfer.on("timeupdate", () => this.tick());
    this.regions.on("region-clicked", (region, event) => {
      event.stopPropagation();
      this.hooks.onSelect(this.events[Number(region.id.split("-")[1])]);
    });
    element("play").disabled = !item.playable;
  }

  colours() {
    return { waveColor: colour("wave"), progressColor: colour("accent"), cursorColor: colour("ink") };
  }

  /** Give the samples of a long recording to a worker; returns what is needed to draw its waveform. */
  overview({ mono, rate }) {
    this.worker = new Worker(new URL("overview.js", import.meta.url), { type: "module" });
    return new Promise((resolve) => {
      this.worker.onmessage = ({ data }) => {
        if (data.peaks) resolve(data.peaks);
        else this.paint(data);
      };
      this.worker.postMessage({ samples: mono, rate }, [mono.buffer]);
    });
  }

  /** The spectrogram in the colours of the theme, and the time axis below it. */
  drawSpectrogram() {
    const { samples, surfer } = this;
    if (this.spectrogram) surfer.unregisterPlugin(this.spectrogram);
    this.spectrogram = null;
    const height = samples ? SPECTROGRAM_HEIGHT : 0;
    const highest = samples ? Math.min(16000, samples.rate / 2) : 0;
    this.palette = spectrumColours();
    if (samples && this.worker) {
      // as wide as the view, and stays there while the waveform is scrolled
      const place = make("div");
      place.style.height = `${height}px`;
      this.canvas?.parentElement.remove();
      this.canvas = make("canvas");
      Object.assign(this.canvas.style, { position: "sticky", left: "0", background: colour("panel") });
      place.append(this.canvas);
      surfer.getWrapper().append(place);
      this.wish = null;
      this.drawOverview();
    } else if (samples) {
      const { duration } = samples;
      this.spectrogram = SpectrogramPlugin.create({
        height,
        fftSamples: FFT_SIZE,
        noverlap: duration < 60 ? FFT_SIZE * 0.75 : FFT_SIZE / 2,
        frequencyMin: 0,
        frequencyMax: highest,
        scale: "mel",
        gainDB: 2 - samples.loud,
        rangeDB: RANGE,
        colorMap: this.palette.map((rgb) => [...rgb.map((value) => value / 255), 1]),
      });
      surfer.registerPlugin(this.spectrogram);
    }
    labelFrequencies(element("frequencies"), WAVE_HEIGHT, height, highest);
    this.timeStep = null;
    this.drawTimes();
    element("wave").style.minHeight = `${WAVE_HEIGHT + height + TIMELINE_HEIGHT}px`;
  }

  /** Times below the spectrogram, as dense as the zoom allows. */
  drawTimes() {
    const { surfer } = this;
    const perSecond = surfer.getWrapper().clientWidth / (this.duration || 1);
    const step = TIME_STEPS.find((seconds) => seconds * perSecond >= 62) ?? 7200;
    const color = colour("grey");
    if (this.timeStep === `${step} ${color}`) return;
    this.timeStep = `${step} ${color}`;
    if (this.times) surfer.unregisterPlugin(this.times);
    const fine = step / 5;
    this.times = TimelinePlugin.create({
      height: TIMELINE_HEIGHT,
      timeInterval: this.duration / fine > 1500 ? step : fine,
      primaryLabelInterval: step,
      secondaryLabelInterval: step,
      // times stand under the middle of their ticks, the first one inside
      formatTimeCallback: (seconds) => (seconds ? "" : "\u2003\u2006") + clock(seconds, step < 1 ? 1 : 0),
      style: { color, fontSize: "11px" },
    });
    surfer.registerPlugin(this.times);
  }

  /** Ask the worker for the spectrogram of what is in view; until it comes the last one is shown in its place. */
  drawOverview() {
    const width = Math.floor(element("tracks").clientWidth);
    const [from, to] = this.view;
    if (!width || to <= from) return;
    const key = `${from} ${to} ${width}`;
    if (this.wish !== key) {
      this.wish = key;
      const highest = Math.min(16000, this.samples.rate / 2);
      this.worker.postMessage({ from, to, columns: width, bands: BANDS, highest });
    }
    const context = fit(this.canvas, width, SPECTROGRAM_HEIGHT);
    this.canvas.style.width = `${width}px`;
    if (!this.picture) return;
    const { bitmap } = this.picture;
    const scale = width / (to - from);
    const left = (this.picture.from - from) * scale;
    context.drawImage(bitmap, left, 0, (this.picture.to - this.picture.from) * scale, SPECTROGRAM_HEIGHT);
  }

  /** What the worker made. */
  paint({ from, to, columns, bands, levels }) {
    this.levels = { from, to, columns, bands, levels };
    if (!this.surfer) return;
    const pixels = new ImageData(columns, bands);
    const floor = this.samples.loud - RANGE + 2;
    for (let column = 0; column < columns; column++) {
      for (let band = 0; band < bands; band++) {
        const share = (levels[column * bands + band] - floor) / RANGE;
        const [r, g, b] = this.palette[Math.max(0, Math.min(255, Math.round(share * 255)))];
        pixels.data.set([r, g, b, 255], 4 * ((bands - 1 - band) * columns + column));
      }
    }
    const bitmap = new OffscreenCanvas(columns, bands);
    bitmap.getContext("2d").putImageData(pixels, 0, 0);
    this.picture = { from, to, bitmap };
    this.drawOverview();
  }

  /** The theme changed. */
  restyle() {
    if (this.surfer) {
      this.surfer.setOptions(this.colours());
      this.drawSpectrogram();
      if (this.levels) this.paint(this.levels);
    }
    this.setEvents(this.events);
    this.drawTracks();
  }

  close() {
    this.controls?.abort();
    this.surfer?.destroy();
    this.worker?.terminate();
    this.surfer = this.samples = this.end = this.worker = this.spectrogram = this.times = null;
    this.canvas = this.picture = this.levels = null;
    this.events = [];
    this.rows = [];
    element("audio").pause();
    element("audio").removeAttribute("src");
    element("zoom").value = 0;
    element("wave").replaceChildren();
    delete element("wave").dataset.ready;
    element("frequencies").replaceChildren();
    element("names").replaceChildren();
    element("play").disabled = false;
    this.showPlaying();
    element("clock").replaceChildren();
  }

  // --- time ---------------------------------------------------------------------------------

  /** The stretch that is in view moved: what hangs on it moves with it. */
  follow() {
    if (this.pending) return;
    this.pending = nextFrame().then(() => {
      this.pending = null;
      this.measure();
      if (this.surfer) this.drawTimes();
      if (this.canvas) this.drawOverview();
      this.drawTracks();
      this.drawRegions();
      this.tick();
    });
  }

  measure() {
    const { surfer, duration } = this;
    const total = surfer?.getWrapper().clientWidth || 1;
    const left = surfer?.getScroll() ?? 0;
    const width = surfer?.getWidth() || element("tracks").clientWidth;
    this.view = surfer ? [(left / total) * duration, Math.min(1, (left + width) / total) * duration] : [0, duration];
  }

  tick() {
    const { time, duration } = this;
    const [from, to] = this.view;
    const place = (time - from) / (to - from || 1);
    const head = element("playhead");
    head.hidden = !this.surfer || place < 0 || place > 1;
    head.style.transform = `translateX(${place * element("tracks").clientWidth}px)`;
    if (duration) {
      const decimals = duration < 3600 ? 1 : 0;
      element("clock").replaceChildren(
        make("b", {}, clock(time, decimals)),
        make("span", {}, ` / ${clock(duration, decimals)}`),
      );
    }
    this.hooks.onTime(time);
  }

  showPlaying() {
    const on = this.sounding;
    element("play").replaceChildren(icon(on ? "pause" : "play"));
    element("play").setAttribute("aria-label", on ? "Pause" : "Play");
  }

  /** From 0, everything in view, to 100. */
  zoom(amount) {
    if (!this.surfer || !this.duration) return;
    const least = this.surfer.getWidth() / this.duration;
    const middle = (this.view[0] + this.view[1]) / 2;
    const kept = this.time >= this.view[0] && this.time <= this.view[1] ? this.time : middle;
    const share = (kept - this.view[0]) / (this.view[1] - this.view[0] || 1);
    const most = Math.max(least, Math.min(MAX_ZOOM, MAX_WIDTH / this.duration));
    const pixels = amount <= 0 ? 0 : least * (most / least) ** (amount / 100);
    element("zoom").value = amount;
    this.surfer.zoom(pixels);
    this.surfer.setScroll(kept * Math.max(pixels, least) - share * this.surfer.getWidth());
    this.follow();
  }

  zoomBy(step) {
    this.zoom(Math.max(0, Math.min(100, Number(element("zoom").value) + step)));
  }

  wheel(event) {
    if (!this.surfer) return;
    if (event.ctrlKey || event.metaKey) {
      event.preventDefault();
      this.zoomBy(event.deltaY < 0 ? 6 : -6);
    } else if (event.deltaX && event.currentTarget === element("tracks")) {
      event.preventDefault();
      this.surfer.setScroll(this.surfer.getScroll() + event.deltaX);
    }
  }

  // --- sound --------------------------------------------------------------------------------

  start(from, to) {
    const audio = element("audio");
    if (from !== null) audio.currentTime = from;
    this.end = to;
    // refused where a newer wish came before it began
    audio.play().catch(() => {});
    const watch = () => {
      this.stopAtEnd();
      if (this.sounding && this.end === to) requestAnimationFrame(watch);
    };
    if (to !== null) requestAnimationFrame(watch);
  }

  /** An event was heard to its offset. */
  stopAtEnd() {
    const audio = element("audio");
    if (this.end === null || audio.seeking || audio.currentTime < this.end) return;
    audio.pause();
    audio.currentTime = this.end;
    this.end = null;
  }

  playPause() {
    if (!this.item?.playable || !this.surfer) return;
    if (this.sounding) element("audio").pause();
    else this.start(null, null);
  }

  /** Play an event from its onset to its offset. */
  play(event) {
    this.reveal(event);
    if (this.item?.playable && this.surfer) this.start(event.onset, event.offset);
  }

  seek(seconds) {
    if (!this.item?.playable || !this.surfer) return;
    this.end = null;
    const time = Math.max(0, Math.min(this.duration, seconds));
    element("audio").currentTime = time;
    this.reveal({ onset: time, offset: time });
    this.tick();
  }

  /** Bring an event into view. */
  reveal({ onset, offset }) {
    const [from, to] = this.view;
    if (!this.surfer || (onset >= from && offset <= to)) return;
    const span = to - from;
    const start = offset - onset > span ? onset : (onset + offset) / 2 - span / 2;
    this.surfer.setScrollTime(Math.max(0, start));
    this.follow();
  }

  // --- events -------------------------------------------------------------------------------

  /** Show these events, each with a `token` for its colour. */
  setEvents(events) {
    this.events = events;
    this.drawn = null;
    this.drawRegions();
    this.drawTracks();
  }

  drawRegions() {
    if (!this.surfer || !element("wave").dataset.ready) return;
    const [from, to] = this.view;
    const margin = (to - from) / 2;
    const near = [];
    this.events.forEach((event, index) => {
      if (event.offset >= from - margin && event.onset <= to + margin) near.push(index);
    });
    const chosen = near.length > MAX_REGIONS ? [] : near;
    // scrolling within what is there already changes nothing
    const key = chosen.join();
    if (this.drawn === key) return;
    this.drawn = key;
    this.regions.clearRegions();
    for (const index of chosen) {
      const event = this.events[index];
      const rgb = colour(event.token);
      const region = this.regions.addRegion({
        id: `event-${index}`,
        start: event.onset,
        end: event.offset,
        drag: false,
        resize: false,
        color: "transparent",
        content: this.tagOf(event, rgb),
      });
      if (!region.element) continue;
      // over the waveform alone: the colours of the spectrogram mean loudness
      const tint = faint(rgb, 0.1);
      region.element.style.backgroundImage = `linear-gradient(${tint}, ${tint})`;
      region.element.style.backgroundSize = `100% ${WAVE_HEIGHT}px`;
      region.element.style.backgroundRepeat = "no-repeat";
      region.element.style.cursor = "pointer";
      region.element.title = `${readable(event.event_label)}, ${clock(event.onset, 1)} to ${clock(event.offset, 1)}, ${event.probability.toFixed(2)}`;
    }
  }

  /** The head of a region; heads that would overlap are put below each other by the plugin. */
  tagOf(event, rgb) {
    const tag = make("div", {}, readable(event.event_label));
    // inside the shadow tree of the waveform, where the style sheet does not reach
    Object.assign(tag.style, {
      height: `${HEAD_HEIGHT}px`,
      padding: "0 6px",
      overflow: "hidden",
      textOverflow: "ellipsis",
      whiteSpace: "nowrap",
      font: `560 11.5px/${HEAD_HEIGHT - 1}px "Inter", system-ui, sans-serif`,
      color: colour("ink"),
      background: `linear-gradient(${faint(rgb, 0.34)} 0 0), ${colour("sheet")}`,
      borderLeft: `3px solid ${rgb}`,
      borderRadius: "3px",
      boxSizing: "border-box",
      pointerEvents: "none",
    });
    return tag;
  }

  // --- posteriors ---------------------------------------------------------------------------

  /** Show these classes: `{label, token, column, threshold, pressed}` each. */
  setRows(rows) {
    this.rows = rows;
    element("names").replaceChildren(
      ...rows.map((row) =>
        make(
          "button",
          {
            class: "name",
            "data-label": row.label,
            "aria-pressed": String(row.pressed),
            title: `Show ${readable(row.label)} alone`,
            onclick: () => this.hooks.onName(row.label),
          },
          dot(row.token),
          make("span", {}, readable(row.label)),
        ),
      ),
    );
    this.drawTracks();
  }

  drawTracks() {
    const { rows } = this;
    const boundaries = this.item?.boundaries;
    const width = Math.floor(element("tracks").clientWidth);
    const rowHeight = parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row"));
    const canvas = element("posteriors");
    const context = fit(canvas, width, Math.max(0, rows.length * rowHeight));
    canvas.hidden = !rows.length;
    if (!rows.length || !boundaries || !width) return;
    const [from, to] = this.view;
    const x = (seconds) => ((seconds - from) / (to - from || 1)) * width;
    const step = this.item.frameSeconds;
    const count = boundaries.length - 1;
    const last = Math.min(width, Math.ceil(x(boundaries[count])));
    const [rule, grey] = [colour("rule"), colour("grey")];

    rows.forEach((row, index) => {
      const top = index * rowHeight;
      const baseline = top + rowHeight - 8;
      const height = rowHeight - 14;
      const rgb = colour(row.token);
      // the highest posterior of each pixel
      const values = [];
      for (let pixel = 0; pixel < last; pixel++) {
        const first = Math.floor((from + (pixel / width) * (to - from)) / step);
        const stop = Math.max(first + 1, Math.floor((from + ((pixel + 1) / width) * (to - from)) / step));
        let highest = 0;
        for (let i = Math.max(0, first); i < Math.min(stop, count); i++) {
          if (row.column[i] > highest) highest = row.column[i];
        }
        values.push(highest);
      }
      for (const event of this.events) {
        if (event.event_label !== row.label || event.offset < from || event.onset > to) continue;
        const left = x(event.onset);
        const wide = Math.max(2, x(event.offset) - left);
        drawEvent(context, rgb, 0.11, left, wide, top, rowHeight, baseline);
      }
      drawCurve(context, values, rgb, baseline, height);
      const level = Math.round(baseline - height * row.threshold) + 0.5;
      context.strokeStyle = faint(grey, 0.8);
      context.lineWidth = 1;
      context.setLineDash([4, 4]);
      context.beginPath();
      context.moveTo(0, level);
      context.lineTo(width, level);
      context.stroke();
      context.setLineDash([]);
      if (index) {
        context.fillStyle = rule;
        context.fillRect(0, top, width, 1);
      }
    });
  }

  clickTracks(event) {
    if (!this.item?.boundaries) return;
    const box = element("posteriors").getBoundingClientRect();
    const seconds = this.view[0] + ((event.clientX - box.left) / box.width) * (this.view[1] - this.view[0]);
    const row = this.rows[Math.floor((event.clientY - box.top) / (box.height / this.rows.length))];
    const hit = this.events.find(
      (each) => each.event_label === row?.label && each.onset <= seconds && seconds <= each.offset,
    );
    if (hit) this.hooks.onSelect(hit);
    else this.seek(seconds);
  }
}
