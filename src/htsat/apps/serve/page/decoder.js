/**
 * From framewise posteriors to events: what `htsat.detection.decoder` does, in the browser.
 *
 * The same steps in the same order give the same events, to the last bit: median filter, hysteresis, merging of
 * events closer than `min_gap`, dropping of those shorter than `min_duration`. So thresholds can be moved without
 * asking the server again. See the Python module for the conventions; tests compare the two.
 */

const TOLERANCE = 1e-9;
export const SETTINGS = ["threshold", "threshold_off", "median_seconds", "min_duration", "min_gap"];

/** The settings that hold for one label. */
export function settingsFor(config, label) {
  return { ...config, ...(config.per_class?.[label] ?? {}) };
}

/** The same settings with these for every class; exceptions for them are removed, as `--threshold` does. */
export function withSettings(config, changes) {
  const perClass = {};
  for (const [label, exceptions] of Object.entries(config.per_class ?? {})) {
    const rest = Object.entries(exceptions).filter(([name]) => !(name in changes));
    if (rest.length) perClass[label] = Object.fromEntries(rest);
  }
  return { ...config, ...changes, per_class: perClass };
}

/** The odd number of frames nearest to `medianSeconds`, at least 1 (the longer one on a tie). */
export function medianFrames(medianSeconds, frameSeconds) {
  return 2 * Math.floor(medianSeconds / frameSeconds / 2 + TOLERANCE) + 1;
}

/** Boundaries of `numFrames` frames; the last one is the end of the recording. */
export function frameBoundaries(numFrames, frameSeconds, duration) {
  const boundaries = new Float64Array(numFrames + 1);
  for (let i = 0; i < numFrames; i++) boundaries[i] = i * frameSeconds;
  boundaries[numFrames] = duration;
  return boundaries;
}

function longestFrame(boundaries) {
  let longest = 0;
  for (let i = 1; i < boundaries.length; i++) longest = Math.max(longest, boundaries[i] - boundaries[i - 1]);
  return longest;
}

/**
 * Where the running median reaches a threshold: where the majority of `length` values does, the first and the last
 * value repeated at the edges.
 */
export function medianAtLeast(column, threshold, length) {
  const count = column.length;
  const active = new Uint8Array(count);
  // posteriors are float32 and are compared as such
  const limit = column instanceof Float32Array ? Math.fround(threshold) : threshold;
  for (let i = 0; i < count; i++) active[i] = column[i] >= limit ? 1 : 0;
  if (length === 1) return active;
  const half = (length - 1) / 2;
  const majority = new Uint8Array(count);
  const [first, last] = [active[0], active[count - 1]];
  // how many of the frames i - half ... i + half are active, the first and the last one repeated
  let sum = first * half;
  for (let i = 0; i <= half; i++) sum += i < count ? active[i] : last;
  for (let i = 0; i < count; i++) {
    majority[i] = sum > half ? 1 : 0;
    sum += i + half + 1 < count ? active[i + half + 1] : last;
    sum -= i - half >= 0 ? active[i - half] : first;
  }
  return majority;
}

function runs(active) {
  const found = [];
  let start = -1;
  for (let i = 0; i <= active.length; i++) {
    if (i < active.length && active[i]) {
      if (start < 0) start = i;
    } else if (start >= 0) {
      found.push([start, i]);
      start = -1;
    }
  }
  return found;
}

/** First and one-past-last frame of each event of one class, in time order. */
function regions(column, boundaries, settings, length) {
  const on = medianAtLeast(column, settings.threshold, length);
  if (!on.includes(1)) return [];
  const onStarts = runs(on).map(([start]) => start);
  const off = settings.threshold_off ?? settings.threshold;
  let found = runs(off === settings.threshold ? on : medianAtLeast(column, off, length));
  let next = 0;
  found = found.filter(([start, stop]) => {
    while (next < onStarts.length && onStarts[next] < start) next++;
    return next < onStarts.length && onStarts[next] < stop;
  });
  if (settings.min_gap > 0) {
    const joined = [];
    for (const region of found) {
      const last = joined.at(-1);
      const apart = !last || boundaries[region[0]] - boundaries[last[1]] >= settings.min_gap - TOLERANCE;
      if (apart) joined.push([...region]);
      else last[1] = region[1];
    }
    found = joined;
  }
  if (settings.min_duration > 0) {
    found = found.filter(([start, stop]) => boundaries[stop] - boundaries[start] >= settings.min_duration - TOLERANCE);
  }
  return found;
}

/**
 * Turn framewise posteriors into events.
 *
 * @param {ArrayLike<number>[]} columns posteriors of each class, one value per frame.
 * @param {Float64Array} boundaries seconds; frame i covers boundaries[i] to boundaries[i + 1].
 * @param {string[]} labels one per class.
 * @param {object} config thresholds, filter and durations, with exceptions in `per_class`.
 * @returns events by onset, then in the order of `labels`; `probability` is the largest posterior inside.
 */
export function decodeEvents(columns, boundaries, labels, config) {
  const frameSeconds = longestFrame(boundaries);
  const events = [];
  labels.forEach((label, index) => {
    const column = columns[index];
    const settings = settingsFor(config, label);
    const length = medianFrames(settings.median_seconds, frameSeconds);
    for (const [start, stop] of column.length ? regions(column, boundaries, settings, length) : []) {
      let peak = 0;
      for (let i = start; i < stop; i++) peak = Math.max(peak, column[i]);
      events.push({
        event_label: label,
        onset: boundaries[start],
        offset: boundaries[stop],
        probability: Math.min(1, peak),
      });
    }
  });
  return events.sort((a, b) => a.onset - b.onset); // stable
}
