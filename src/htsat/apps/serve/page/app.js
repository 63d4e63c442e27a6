/** The page: recordings given to it, what the server hears in them, and how it is shown. */

import { ApiError, columnsOf, detect, models, onTokenNeeded, setToken } from "./api.js";
import { decodeEvents, frameBoundaries, settingsFor, withSettings } from "./decoder.js";
import { FORMATS, download } from "./formats.js";
import { LiveView } from "./live.js";
import { classToken, clock, counted, dot, eventRow, icon, make, readable, saveMenu, showTags, spoken } from "./look.js";
import { level, openMicrophone, toPcm, wav } from "./microphone.js";
import { Stage } from "./stage.js";

const element = (id) => document.getElementById(id);

/** Requests at once; the server has other clients. */
const AT_ONCE = 2;
/** Rows of the table at once, and classes whose posteriors are shown without being asked for. */
const ROWS = 150;
const TRACKS = 6;
const POINT_NAMES = { high_precision: "High precision", balanced: "Balanced", high_recall: "High recall" };

const state = {
  models: [],
  model: null,
  items: [],
  current: null,
  /** how posteriors become events: an operating point's name, or a threshold for all classes */
  point: null,
  threshold: null,
  /** labels that are shown alone; none: all */
  only: new Set(),
  allTracks: false,
  shownRows: ROWS,
  selected: null,
};

const stage = new Stage({ onSelect: (event) => select(event), onTime: (seconds) => sync(seconds), onName: toggleOnly });

// --- recordings --------------------------------------------------------------------------------

function add(files) {
  const fresh = [...files].map((file) => ({
    name: file.name || "recording.wav",
    file,
    state: "waiting",
    share: 0,
    note: "waiting",
    controls: null,
    result: null,
    error: null,
  }));
  if (!fresh.length) return;
  state.items.push(...fresh);
  showTab("recordings");
  open(fresh[0]);
  work();
}

/** Start what waits, as many as may run at once. */
function work() {
  if (!state.model) return;
  const busy = state.items.filter((item) => item.state === "busy").length;
  for (const item of state.items.filter((each) => each.state === "waiting").slice(0, Math.max(0, AT_ONCE - busy)))
    hear(item);
}

async function hear(item) {
  item.state = "busy";
  item.error = null;
  item.controls = new AbortController();
  progress(item, 0, "sending");
  try {
    const result = await detect(item.file, {
      name: item.name,
      model: state.model?.name,
      signal: item.controls.signal,
      onUpload: (share) =>
        progress(item, share * 0.2, share < 1 ? `sending ${Math.round(share * 100)} %` : "waiting for the server"),
      onProgress: (seconds, duration) =>
        progress(
          item,
          duration ? 0.2 + 0.8 * Math.min(1, seconds / duration) : null,
          `heard ${clock(Math.min(seconds, duration ?? seconds))}${duration ? ` of ${clock(duration)}` : ""}`,
        ),
    });
    receive(item, result);
  } catch (error) {
    if (error.name === "AbortError") return;
    if (error.retryAfter !== null && (error.status === 429 || error.status === 503)) {
      waitFor(item, error.retryAfter);
      return;
    }
    if (!(error instanceof ApiError)) console.error(error);
    item.state = "failed";
    item.error = error.message;
    announce(`${item.name}: ${error.message}`);
  }
  listFiles();
  if (item === state.current) render();
  work();
}

/** The server has too much to do: it said when to come back. */
function waitFor(item, seconds) {
  item.state = "later";
  progress(item, 0, `the server is busy; again in ${seconds} s`);
  const timer = setTimeout(() => {
    item.state = "waiting";
    work();
  }, seconds * 1000);
  item.controls.signal.addEventListener("abort", () => clearTimeout(timer));
  work();
}

function receive(item, result) {
  const { posteriors } = result;
  item.state = "done";
  item.result = result;
  const order = state.model.labels;
  const columns = columnsOf(posteriors);
  const known = posteriors.labels.map((label, index) => ({ label, column: columns[index] }));
  // in the order of the model, as the server has them: ties are then sorted alike
  known.sort((a, b) => order.indexOf(a.label) - order.indexOf(b.label));
  item.labels = known.map(({ label }) => label);
  item.columns = known.map(({ column }) => column);
  item.peaks = item.columns.map((column) => column.reduce((highest, value) => Math.max(highest, value), 0));
  item.frameSeconds = posteriors.frame_seconds;
  item.boundaries = frameBoundaries(posteriors.num_frames, posteriors.frame_seconds, result.duration);
  item.ranks = ranked(item, result.events);
  item.decoded = null;
  // what the browser cannot play has its time axis from the server
  if (item === state.current && item.drawable === false) stage.open(null, result.duration);
  announce(`${item.name}: ${counted(eventsOf(item).length, "event")}`);
}

/** Labels in the order of their colours, as in the pictures of `htsat detect --plot`. */
function ranked(item, events) {
  const best = new Map();
  for (const event of events)
    best.set(event.event_label, Math.max(best.get(event.event_label) ?? 0, event.probability));
  const sounding = [...best.keys()].sort((a, b) => best.get(b) - best.get(a));
  const quiet = item.labels.map((label, index) => ({ label, peak: item.peaks[index] })).sort((a, b) => b.peak - a.peak);
  const order = [...sounding, ...quiet.map(({ label }) => label).filter((label) => !best.has(label))];
  return new Map(order.map((label, rank) => [label, rank]));
}

function progress(item, share, note) {
  item.share = share;
  item.note = note;
  const row = item.row;
  if (row) {
    row.querySelector("small").textContent = note;
    const bar = row.querySelector("progress");
    if (bar && share !== null) bar.value = share;
  }
  if (item === state.current) showWaiting();
}

function remove(item) {
  item.controls?.abort();
  if (item.address) URL.revokeObjectURL(item.address);
  const index = state.items.indexOf(item);
  state.items.splice(index, 1);
  if (item === state.current) open(state.items[Math.min(index, state.items.length - 1)] ?? null);
  else listFiles();
  work();
}

function again(item) {
  item.state = "waiting";
  progress(item, 0, "waiting");
  render();
  work();
}

function open(item) {
  state.current = item;
  state.only.clear();
  state.selected = null;
  state.shownRows = ROWS;
  state.allTracks = false;
  element("empty").hidden = Boolean(state.items.length);
  element("desk").hidden = !state.items.length;
  element("desk").classList.toggle("single", state.items.length < 2);
  listFiles();
  stage.show(item).then(() => item === state.current && render());
  render();
}

// --- how posteriors become events --------------------------------------------------------------

/** The settings that hold now. */
function settings() {
  const { model, point, threshold } = state;
  const base = model.operating_points?.[point] ?? model.decoding;
  return threshold === null ? base : withSettings(base, { threshold, threshold_off: null });
}

/** The events of a recording under the settings that hold now, of every class. */
function eventsOf(item) {
  if (!item.result) return [];
  const key = `${state.point} ${state.threshold}`;
  if (item.decoded?.key !== key) {
    const config = settings();
    const events = decodeEvents(item.columns, item.boundaries, item.labels, config);
    // classes beyond those whose posteriors came: as the server has them, where they are sure enough
    const known = new Set(item.labels);
    const others = item.result.events.filter(
      (event) => !known.has(event.event_label) && event.probability >= settingsFor(config, event.event_label).threshold,
    );
    if (others.length) (events.push(...others), events.sort((a, b) => a.onset - b.onset));
    item.decoded = {
      key,
      events: events.map((event) => ({ ...event, token: classToken(item.ranks.get(event.event_label)) })),
    };
  }
  return item.decoded.events;
}

const shownEvents = (item) => eventsOf(item).filter((event) => !state.only.size || state.only.has(event.event_label));

function setPoint(name) {
  state.point = name;
  state.threshold = null;
  changed();
}

function setThreshold(value) {
  state.threshold = Math.round(Math.max(0.01, Math.min(0.99, value)) * 100) / 100;
  changed();
}

function changed() {
  state.selected = null;
  showDecoding();
  if (!changed.pending) {
    changed.pending = requestAnimationFrame(() => {
      changed.pending = null;
      renderEvents();
      listFacts();
    });
  }
}

function showDecoding() {
  const { model, point, threshold } = state;
  if (!model) return;
  const names = Object.keys(model.operating_points ?? {}).sort(
    (a, b) => Object.keys(POINT_NAMES).indexOf(a) - Object.keys(POINT_NAMES).indexOf(b),
  );
  const holder = element("points");
  holder.hidden = !names.length;
  if (holder.dataset.of !== model.name) {
    holder.dataset.of = model.name;
    holder.replaceChildren(
      ...names.map((name) =>
        make(
          "button",
          { role: "radio", "data-point": name, onclick: () => setPoint(name) },
          POINT_NAMES[name] ?? readable(name),
        ),
      ),
    );
  }
  for (const button of holder.children) {
    const on = threshold === null && button.dataset.point === point;
    button.setAttribute("aria-checked", String(on));
  }
  const config = settings();
  const own = Object.values(config.per_class ?? {}).some((exceptions) => "threshold" in exceptions);
  element("threshold").value = config.threshold;
  element("threshold-value").textContent = own ? "per class" : config.threshold.toFixed(2);
}

// --- what is shown -----------------------------------------------------------------------------

function listFiles() {
  const list = element("files");
  list.replaceChildren(
    ...state.items.map((item) => {
      const open_ = make(
        "button",
        { class: "file-open", "aria-current": item === state.current ? "true" : null, onclick: () => open(item) },
        make("b", {}, item.name),
        make("small", {}),
      );
      const close = make(
        "button",
        { class: "icon", "aria-label": `Remove ${item.name}`, onclick: () => remove(item) },
        icon("close"),
      );
      const row = make("li", { class: `file ${item.state}${item === state.current ? " current" : ""}` }, open_, close);
      if (item.state === "busy" || item.state === "waiting")
        row.append(make("progress", { max: 1, value: item.share ?? 0 }));
      item.row = row;
      return row;
    }),
  );
  listFacts();
  element("desk").classList.toggle("single", state.items.length < 2);
  element("files-foot").hidden = state.items.filter((item) => item.result).length < 2;
}

function listFacts() {
  for (const item of state.items) {
    const facts =
      item.state === "done"
        ? `${clock(item.result.duration)} · ${counted(eventsOf(item).length, "event")}`
        : item.state === "failed"
          ? item.error
          : item.note;
    if (item.row) item.row.querySelector("small").textContent = facts;
  }
}

function notify(kind, text, ...buttons) {
  const notice = element("notice");
  notice.hidden = !text;
  notice.classList.toggle("mild", kind === "mild");
  notice.replaceChildren(...(text ? [icon("warn"), make("p", {}, text), ...buttons] : []));
}

function showWaiting() {
  const item = state.current;
  const waiting = element("waiting");
  waiting.hidden = !item || item.state === "done" || item.state === "failed";
  if (waiting.hidden) return;
  waiting.querySelector("i").style.setProperty("--share", item.share ?? 0.5);
  waiting.querySelector("span").textContent = item.note;
}

function render() {
  const item = state.current;
  document.title = item ? `${item.name} – htsat` : "htsat";
  if (!item) return;
  element("title").textContent = item.name;
  showWaiting();
  showDecoding();
  if (item.state === "failed") {
    const retry = make("button", { onclick: () => again(item) }, icon("again"), "Try again");
    notify("error", item.error, retry);
  } else if (item.result && item.playable === false) {
    notify("mild", "This browser cannot play this kind of file. What the server heard in it is shown all the same.");
  } else if (item.result && item.drawable === false) {
    notify(
      "mild",
      "This recording is too much to be drawn here. It plays, and what the server heard in it is complete.",
    );
  } else notify("mild", "");
  element("sheet").hidden = item.state === "failed";
  element("desk").classList.toggle("failed", item.state === "failed");
  document.querySelector(".decoding").hidden = !item.result;
  showTags(element("tags"), item.result?.tags.slice(0, 5) ?? [], (label) =>
    item.ranks.has(label) ? classToken(item.ranks.get(label)) : null,
  );
  renderEvents();
}

function renderEvents() {
  const item = state.current;
  if (!item) return;
  const all = eventsOf(item);
  const shown = shownEvents(item);
  element("facts").textContent = item.result
    ? [
        spoken(item.result.duration),
        all.length ? counted(all.length, "event") : "no event",
        state.models.length > 1 ? item.result.model : "",
      ]
        .filter(Boolean)
        .join(" · ")
    : item.file.size > 1e6
      ? `${(item.file.size / 1e6).toFixed(1)} MB`
      : "";
  stage.setEvents(shown);
  renderChips(item, all);
  renderRows(item);
  renderTable(item, shown);
}

function renderChips(item, all) {
  const counts = new Map();
  for (const event of all) counts.set(event.event_label, (counts.get(event.event_label) ?? 0) + 1);
  for (const label of state.only) if (!counts.has(label)) counts.set(label, 0);
  const labels = [...counts.keys()].sort((a, b) => item.ranks.get(a) - item.ranks.get(b));
  const chips = element("chips");
  chips.hidden = labels.length < 2 && !state.only.size;
  chips.classList.toggle("filtered", state.only.size > 0);
  const focused = document.activeElement?.closest?.(".chip")?.dataset.label;
  chips.replaceChildren(
    ...labels.map((label) => {
      const tint = classToken(item.ranks.get(label));
      const chip = make(
        "button",
        {
          class: "chip",
          "data-label": label,
          "aria-pressed": String(state.only.has(label)),
          onclick: () => toggleOnly(label),
        },
        dot(tint),
        readable(label),
        make("em", {}, String(counts.get(label))),
      );
      chip.style.setProperty("--colour", `var(--${tint})`);
      return chip;
    }),
  );
  if (focused) chips.querySelector(`[data-label="${CSS.escape(focused)}"]`)?.focus();
}

function toggleOnly(label) {
  if (!state.only.delete(label)) state.only.add(label);
  state.selected = null;
  renderEvents();
}

/** Posteriors: of the classes with events, and of the most probable others. */
function renderRows(item) {
  if (!item.result) {
    stage.setRows([]);
    element("more-tracks").hidden = true;
    return;
  }
  const config = settings();
  const sounding = new Set(eventsOf(item).map((event) => event.event_label));
  const order = [...item.labels].sort((a, b) => item.ranks.get(a) - item.ranks.get(b));
  let labels = order.filter((label) => !state.only.size || state.only.has(label));
  const hidden = labels.length;
  if (!state.allTracks && !state.only.size) {
    labels = labels.filter((label, place) => sounding.has(label) || place < TRACKS);
  }
  stage.setRows(
    labels.map((label) => ({
      label,
      token: classToken(item.ranks.get(label)),
      column: item.columns[item.labels.indexOf(label)],
      threshold: settingsFor(config, label).threshold,
      pressed: state.only.has(label),
    })),
  );
  const more = element("more-tracks");
  more.hidden = labels.length === hidden && !(state.allTracks && hidden > TRACKS);
  more.textContent = state.allTracks
    ? "Fewer classes"
    : `${counted(hidden - labels.length, "more class").replace("classs", "classes")}`;
}

function renderTable(item, shown) {
  const body = element("events").tBodies[0];
  element("count").textContent = item.result ? String(shown.length) : "";
  element("save").hidden = !item.result;
  body.replaceChildren(...shown.slice(0, state.shownRows).map((event) => eventRow(event, () => select(event))));
  const more = element("more-events");
  more.hidden = shown.length <= state.shownRows;
  const none = element("none");
  none.hidden = shown.length > 0 || !item.result;
  none.textContent = "No sound reaches the threshold. Lower it, or try high recall.";
  markSelected();
  sync(stage.time, true);
}

/** Mark an event in the table and play it. */
function select(event) {
  state.selected = event;
  markSelected();
  stage.play(event);
}

function markSelected() {
  const index = state.selected ? stage.events.indexOf(state.selected) : -1;
  const rows = element("events").tBodies[0].rows;
  for (const row of element("events").querySelectorAll("[aria-current]")) row.removeAttribute("aria-current");
  if (index < 0 || index >= rows.length) return;
  rows[index].setAttribute("aria-current", "true");
  const scroll = element("scroll");
  if (scroll.scrollHeight > scroll.clientHeight) rows[index].scrollIntoView({ block: "nearest" });
}

/** Mark the rows of what sounds at this moment. */
function sync(seconds, force = false) {
  const rows = element("events").tBodies[0].rows;
  const moving = stage.surfer && (stage.sounding || seconds > 0);
  if (!moving && !force) return;
  stage.events.slice(0, rows.length).forEach((event, index) => {
    // players stop within a millisecond of where they are told to
    const on = Boolean(moving) && event.onset <= seconds + 1e-3 && seconds + 1e-3 < event.offset;
    if (on !== rows[index]?.classList.contains("sounding")) rows[index]?.classList.toggle("sounding", on);
  });
}

function step(direction) {
  const events = stage.events;
  if (!events.length) return;
  let index = state.selected ? events.indexOf(state.selected) + direction : -1;
  if (!state.selected) {
    index = events.findIndex((event) => event.onset >= stage.time - 1e-3);
    if (direction < 0) index = (index < 0 ? events.length : index) - 1;
    else if (index < 0) index = 0;
  }
  select(events[Math.max(0, Math.min(events.length - 1, index))]);
}

// --- downloads ---------------------------------------------------------------------------------

const detections = (item, events) => ({ file: item.name, duration: item.result.duration, events });

/** The name of a file beside the recording's, as `htsat detect --out` calls it. */
const beside = (name, ending) => name.replace(/\.[^.]*$/, "") + ending;

function save(format) {
  const item = state.current;
  const { write, ending, type } = FORMATS[format];
  download(beside(item.name, ending), write([detections(item, shownEvents(item))]), type);
  element("save").open = false;
}

function saveAll(format) {
  const { write, ending, type } = FORMATS[format];
  const done = state.items.filter((item) => item.result);
  download(`recordings${ending}`, write(done.map((item) => detections(item, eventsOf(item)))), type);
}

// --- recording ---------------------------------------------------------------------------------

let recording = null;

async function record() {
  if (recording) return;
  const blocks = [];
  let count = 0;
  try {
    const microphone = await openMicrophone(
      ({ samples }) => {
        blocks.push(toPcm(samples));
        count += samples.length;
        element("recorder-level").value = level(samples);
        element("recorder-time").textContent = clock(count / microphone.sampleRate, 1);
      },
      () => finishRecording(true),
    );
    recording = { microphone, blocks };
  } catch (error) {
    tell(error.message);
    return;
  }
  showTab("recordings");
  element("recorder").hidden = false;
  element("recorder-time").textContent = clock(0, 1);
  element("recorder-stop").focus();
}

function finishRecording(keep) {
  if (!recording) return;
  const { microphone, blocks } = recording;
  recording = null;
  microphone.stop();
  element("recorder").hidden = true;
  if (!keep || !blocks.length) return;
  const now = new Date(Date.now() - new Date().getTimezoneOffset() * 60_000).toISOString();
  const name = `recording ${now.slice(0, 10)} ${now.slice(11, 19).replaceAll(":", ".")}.wav`;
  add([new File([wav(blocks, microphone.sampleRate)], name, { type: "audio/wav" })]);
}

// --- the page ----------------------------------------------------------------------------------

const announce = (text) => (element("status").textContent = text);

/** Say something that belongs to no recording. */
function tell(text) {
  const note = element("empty-note");
  announce(text);
  if (!state.items.length) note.textContent = text;
  else notify("error", text);
}

const live = new LiveView({
  model: () => state.model,
  settings: () => ({ point: state.threshold === null ? state.point : null }),
});

function showTab(name) {
  for (const tab of ["recordings", "live"]) {
    const on = tab === name;
    element(`tab-${tab}`).setAttribute("aria-selected", String(on));
    element(`tab-${tab}`).tabIndex = on ? 0 : -1;
    element(tab).hidden = !on;
  }
  if (name === "live") live.resize();
  else stage.follow();
}

const THEMES = ["auto", "light", "dark"];
function setTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  localStorage.setItem("htsat-theme", name);
  const button = element("theme");
  button.replaceChildren(icon(name));
  button.setAttribute("aria-label", `Colours: ${name === "auto" ? "as the system" : name}`);
  button.title = button.getAttribute("aria-label");
  button.dataset.theme = name;
  restyle();
}

function restyle() {
  stage.restyle();
  live.restyle();
}

function keys(event) {
  if (event.defaultPrevented || event.altKey || event.ctrlKey || event.metaKey) return;
  if (document.querySelector("dialog[open]") || !element("live").hidden) {
    if (event.key === "?" && !document.querySelector("dialog[open]")) element("help").showModal();
    return;
  }
  const on = event.target.closest("button, summary, select, input, a");
  const types = on?.matches("input:not([type=range]), select");
  const slider = on?.matches("input[type=range]");
  if (types) return;
  const steps = { ArrowLeft: -1, ArrowRight: 1 };
  if (event.key === " " && (!on || slider)) stage.playPause();
  else if (event.key in steps && !slider && !on?.closest("[role=tablist], [role=radiogroup]"))
    stage.seek(stage.time + steps[event.key] * (event.shiftKey ? 5 : 1));
  else if (event.key === "n") step(1);
  else if (event.key === "p") step(-1);
  else if (event.key === "+" || event.key === "=") stage.zoomBy(10);
  else if (event.key === "-") stage.zoomBy(-10);
  else if (event.key === "0") stage.zoom(0);
  else if (event.key === "[") setThreshold(settings().threshold - 0.01);
  else if (event.key === "]") setThreshold(settings().threshold + 0.01);
  else if (["1", "2", "3"].includes(event.key)) element("points").children[Number(event.key) - 1]?.click();
  else if (event.key === "o") element("picker").click();
  else if (event.key === "?") element("help").showModal();
  else return;
  event.preventDefault();
}

/** Arrow keys go from one tab, or one operating point, to the next. */
function roving(holder) {
  holder.addEventListener("keydown", (event) => {
    const step_ = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step_) return;
    const all = [...holder.children];
    const next = all[(all.indexOf(document.activeElement) + step_ + all.length) % all.length];
    next.focus();
    next.click();
    event.preventDefault();
  });
}

function wire() {
  const act = { pick: () => element("picker").click(), record };
  for (const button of document.querySelectorAll("[data-act]"))
    button.addEventListener("click", () => act[button.dataset.act]());
  element("picker").addEventListener("change", () => {
    add(element("picker").files);
    element("picker").value = "";
  });
  let inside = 0;
  const carries = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragenter", (event) => {
    if (!carries(event)) return;
    inside++;
    element("drop").hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (carries(event) && --inside <= 0) element("drop").hidden = true;
  });
  addEventListener("dragover", (event) => carries(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    inside = 0;
    element("drop").hidden = true;
    add(event.dataTransfer.files);
  });
  addEventListener("paste", (event) => add(event.clipboardData?.files ?? []));
  addEventListener("keydown", keys);
  addEventListener("keydown", ({ key }) => {
    if (key === "Escape") for (const menu of document.querySelectorAll("details.menu[open]")) menu.open = false;
  });
  addEventListener("click", (event) => {
    for (const menu of document.querySelectorAll("details.menu[open]"))
      if (!menu.contains(event.target)) menu.open = false;
  });
  element("recorder-stop").addEventListener("click", () => finishRecording(true));
  element("recorder-cancel").addEventListener("click", () => finishRecording(false));
  element("threshold").addEventListener("input", (event) => setThreshold(Number(event.target.value)));
  element("more-tracks").addEventListener("click", () => {
    state.allTracks = !state.allTracks;
    renderRows(state.current);
  });
  element("more-events").addEventListener("click", () => {
    state.shownRows += ROWS;
    renderTable(state.current, shownEvents(state.current));
  });
  for (const name of ["recordings", "live"]) element(`tab-${name}`).addEventListener("click", () => showTab(name));
  roving(document.querySelector(".tabs"));
  roving(element("points"));
  element("help-open").addEventListener("click", () => element("help").showModal());
  element("theme").addEventListener("click", () =>
    setTheme(THEMES[(THEMES.indexOf(element("theme").dataset.theme) + 1) % THEMES.length]),
  );
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
  element("model").addEventListener("change", (event) => useModel(event.target.value));
  saveMenu(element("save-list"), save);
  element("save-all").replaceChildren(
    ...Object.entries(FORMATS)
      .filter(([, { single }]) => !single)
      .map(([format, { name }]) => make("button", { "data-format": format, onclick: () => saveAll(format) }, name)),
  );
  onTokenNeeded(
    (refused) =>
      new Promise((resolve) => {
        const dialog = element("token");
        if (refused) element("token-note").textContent = "That token was not accepted. Check it and enter it again.";
        dialog.addEventListener(
          "close",
          () => {
            setToken(element("token-value").value.trim());
            element("token-value").value = "";
            resolve();
          },
          { once: true },
        );
        dialog.showModal();
      }),
  );
  element("token").addEventListener("cancel", (event) => event.preventDefault());
}

function useModel(name) {
  const first = state.model === null;
  state.model = state.models.find((model) => model.name === name);
  state.point = state.model.operating_point;
  state.threshold = null;
  showDecoding();
  // what was heard was heard by another model
  for (const item of first ? [] : state.items) {
    item.controls?.abort();
    item.result = item.decoded = null;
    item.state = "waiting";
    item.note = "waiting";
  }
  listFiles();
  render();
  work();
}

/** A still picture of a posterior, for a page with nothing on it yet. */
function drawEmpty() {
  const bars = element("empty-bars");
  for (let i = 0; i < 48; i++) {
    const bump = Math.exp(-(((i - 14) / 6) ** 2)) + 0.7 * Math.exp(-(((i - 34) / 4.5) ** 2));
    const height = 4 + 58 * Math.min(1, bump) * (0.62 + 0.38 * Math.abs(Math.sin(i * 2.4)));
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, value] of Object.entries({
      x: i * 5,
      y: 36 - height / 2,
      width: 3,
      height,
      rx: 1.5,
      opacity: 0.22 + 0.78 * Math.min(1, bump),
    })) {
      bar.setAttribute(name, value);
    }
    bars.append(bar);
  }
}

async function start() {
  drawEmpty();
  wire();
  setTheme(THEMES.includes(localStorage.getItem("htsat-theme")) ? localStorage.getItem("htsat-theme") : "auto");
  const given = new URL(location.href).searchParams.get("token");
  if (given) {
    setToken(given);
    history.replaceState(null, "", location.pathname);
  }
  try {
    state.models = await models();
  } catch (error) {
    tell(error.message);
    return;
  }
  element("model-field").hidden = state.models.length < 2;
  element("model").replaceChildren(...state.models.map(({ name }) => make("option", { value: name }, name)));
  useModel(state.models[0].name);
  document.documentElement.dataset.ready = "true";
}

start();
