/**
 * Events as files, in the very text of `htsat detect --format ...` (see `htsat.formats`).
 *
 * A recording is `{file, duration, events}`.
 */

/** Name -> what it is called on the page, the ending of its files, whether it holds one recording only. */
export const FORMATS = {
  tsv: { name: "TSV", about: "DCASE table", ending: ".tsv", type: "text/tab-separated-values", write: writeTsv },
  json: { name: "JSON", about: "everything, exact", ending: ".json", type: "application/json", write: writeJson },
  audacity: {
    name: "Audacity",
    about: "label track",
    ending: ".txt",
    type: "text/plain",
    write: writeAudacity,
    single: true,
  },
  raven: { name: "Raven", about: "selection table", ending: ".selections.txt", type: "text/plain", write: writeRaven },
};

/** The band that the published front end hears; Raven draws the boxes from these. */
const RAVEN_BAND = [0, 14000];
const BREAKS = /[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]/g;
const oneLine = (text) => text.replace(BREAKS, " ");
const cellLabel = (label) => oneLine(label).trim();

/** The nearest whole number, the even one on a tie, as Python rounds. */
function roundHalfEven(value) {
  const floor = Math.floor(value);
  const part = value - floor;
  if (part !== 0.5) return part < 0.5 ? floor : floor + 1;
  return floor % 2 === 0 ? floor : floor + 1;
}

/** Onset and offset in units of 10 ** -decimals seconds, at least one unit apart. */
function rounded(event, decimals) {
  const scale = 10 ** decimals;
  const onset = roundHalfEven(event.onset * scale);
  const offset = roundHalfEven(event.offset * scale);
  if (onset < offset) return [onset, offset];
  return event.offset * scale < onset ? [onset - 1, onset] : [onset, onset + 1];
}

function fixed(units, decimals) {
  const digits = String(units).padStart(decimals + 1, "0");
  return `${digits.slice(0, -decimals)}.${digits.slice(-decimals)}`;
}

const seconds = (event, decimals) => rounded(event, decimals).map((units) => fixed(units, decimals));

function writeTsv(recordings) {
  const lines = ["filename\tonset\toffset\tevent_label"];
  for (const { file, events } of recordings) {
    if (!events.length) lines.push(`${oneLine(file)}\t\t\t`);
    for (const event of events) {
      lines.push([oneLine(file), ...seconds(event, 3), cellLabel(event.event_label)].join("\t"));
    }
  }
  return lines.join("\n") + "\n";
}

/** A number as Python writes a float: shortest, always with a point or an exponent. */
function float(value) {
  if (value === null || value === undefined) return "null";
  if (value !== 0 && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e16)) {
    const [digits, exponent] = value.toExponential().split("e");
    const power = Number(exponent);
    return `${digits}e${power < 0 ? "-" : "+"}${String(Math.abs(power)).padStart(2, "0")}`;
  }
  return Number.isInteger(value) ? `${value}.0` : String(value);
}

function writeJson(recordings) {
  const items = recordings.map(({ file, duration, events }) => {
    const rows = events.map((event) =>
      [
        "      {",
        `        "event_label": ${JSON.stringify(event.event_label)},`,
        `        "onset": ${float(event.onset)},`,
        `        "offset": ${float(event.offset)},`,
        `        "probability": ${float(event.probability)}`,
        "      }",
      ].join("\n"),
    );
    const list = rows.length ? `[\n${rows.join(",\n")}\n    ]` : "[]";
    return `  {\n    "file": ${JSON.stringify(file)},\n    "duration": ${float(duration)},\n    "events": ${list}\n  }`;
  });
  return items.length ? `[\n${items.join(",\n")}\n]\n` : "[]\n";
}

function writeAudacity([{ events }]) {
  return events.map((event) => [...seconds(event, 6), cellLabel(event.event_label)].join("\t") + "\n").join("");
}

/** Six decimals, the even digit on a tie; ties need no more than seven binary places. */
function sixDecimals(value) {
  return Number.isInteger(value * 128) ? fixed(roundHalfEven(value * 1e6), 6) : value.toFixed(6);
}

function writeRaven(recordings) {
  const several = recordings.length > 1;
  const header = ["Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)", "High Freq (Hz)"];
  header.push("Event Label", "Probability", ...(several ? ["Begin File", "File Offset (s)"] : []));
  const lines = [header.join("\t")];
  let start = 0;
  for (const { file, duration, events } of recordings) {
    for (const event of events) {
      const [onset, offset] = rounded(event, 6);
      const times = [fixed(start + onset, 6), fixed(start + offset, 6)];
      const cells = [lines.length, "Spectrogram 1", 1, ...times, ...RAVEN_BAND];
      cells.push(cellLabel(event.event_label), sixDecimals(event.probability));
      if (several) cells.push(oneLine(file), fixed(onset, 6));
      lines.push(cells.join("\t"));
    }
    start += several ? roundHalfEven(duration * 1e6) : 0;
  }
  return lines.join("\n") + "\n";
}

/** Save text as a file of the user. */
export function download(name, text, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: `${type};charset=utf-8` }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
