/** The server: models, detection with progress, errors as people can act on them, the token. */

const TOKEN = "htsat-token";

/** What the server or the way to it answered instead of a result. */
export class ApiError extends Error {
  constructor(message, { code = "", status = 0, retryAfter = null } = {}) {
    super(message);
    this.code = code;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** Asks the user for the token; set by the page. Resolves when there is a new one, rejects if there is none. */
let ask = () => Promise.reject(new ApiError("This server asks for a token."));
let asking = null;
export const onTokenNeeded = (callback) => (ask = callback);

const token = () => sessionStorage.getItem(TOKEN);
export const setToken = (value) => sessionStorage.setItem(TOKEN, value);

/** Ask once, however many requests are waiting for the answer. */
function needToken() {
  asking ??= ask(token() !== null).finally(() => (asking = null));
  return asking;
}

const address = (path, query = {}) => {
  const url = new URL(path, document.baseURI);
  for (const [name, value] of Object.entries(query)) {
    if (value !== null && value !== undefined && value !== "") url.searchParams.set(name, value);
  }
  return url;
};

function failure(status, text, retryAfter) {
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // not from the application: a proxy, a server that is starting
  }
  const message = error.message ?? `The server answered ${status}. Try again in a moment.`;
  return new ApiError(message, { code: error.code, status, retryAfter: Number(retryAfter) || null });
}

/** The models of the server, the default one first. */
export async function models() {
  for (;;) {
    let response;
    try {
      const headers = token() ? { Authorization: `Bearer ${token()}` } : {};
      response = await fetch(address("v1/models"), { headers, cache: "no-store" });
    } catch {
      throw new ApiError("The server cannot be reached. Is htsat serve running?");
    }
    if (response.ok) return (await response.json()).models.sort((a, b) => Boolean(b.default) - Boolean(a.default));
    if (response.status !== 401) throw failure(response.status, await response.text(), null);
    await needToken();
  }
}

/**
 * Detect events in a file.
 *
 * @param {Blob} file
 * @param {{name: string, model: string, onUpload: (share: number) => void,
 *   onProgress: (seconds: number, duration: number | null) => void, signal: AbortSignal}} options
 */
export async function detect(file, options) {
  for (;;) {
    try {
      return await detectOnce(file, options);
    } catch (error) {
      if (error.status !== 401) throw error;
      await needToken();
    }
  }
}

function detectOnce(file, { name, model, onUpload, onProgress, signal }) {
  return new Promise((resolve, reject) => {
    // fetch cannot tell how much of a body has been sent
    const request = new XMLHttpRequest();
    request.open("POST", address("v1/detect", { name, model, top: 8, posteriors: 20 }));
    request.setRequestHeader("Accept", "application/x-ndjson");
    request.setRequestHeader("Content-Type", "application/octet-stream");
    if (token()) request.setRequestHeader("Authorization", `Bearer ${token()}`);
    request.upload.onprogress = (event) => onUpload(event.loaded / (event.total || 1));
    request.upload.onload = () => onUpload(1);

    let read = 0;
    let answer = null;
    const lines = () => {
      if (request.status !== 200) return;
      const text = request.responseText;
      for (let end = text.indexOf("\n", read); end >= 0; end = text.indexOf("\n", read)) {
        const line = text.slice(read, end);
        read = end + 1;
        if (!line.trim()) continue;
        const message = JSON.parse(line);
        if (message.type === "progress") onProgress(message.seconds, message.duration);
        else answer = message;
      }
    };
    request.onprogress = lines;
    request.onload = () => {
      if (request.status !== 200) {
        reject(failure(request.status, request.responseText, request.getResponseHeader("Retry-After")));
        return;
      }
      lines();
      finish("The server stopped before it was done. Try again.");
    };
    request.onerror = () => finish("The connection to the server was lost. Is htsat serve still running? Try again.");
    const finish = (nothing) => {
      const { code, message = nothing } = answer?.error ?? {};
      if (answer && !answer.error) resolve(answer);
      else reject(new ApiError(message, { code, status: answer ? 422 : 0 }));
    };
    request.onabort = () => reject(new DOMException("stopped", "AbortError"));
    signal.addEventListener("abort", () => request.abort());
    request.send(file);
  });
}

/** Address of a live stream. */
export function streamAddress(query) {
  const url = address("v1/stream", { ...query, token: token() });
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  return url;
}

/** Base64 of little-endian float32, (numFrames, numLabels) row by row -> one column per label. */
export function columnsOf(posteriors) {
  const packed = atob(posteriors.data);
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const view = new DataView(bytes.buffer);
  const count = posteriors.labels.length;
  return posteriors.labels.map((_, index) => {
    const column = new Float32Array(posteriors.num_frames);
    for (let i = 0; i < column.length; i++) column[i] = view.getFloat32(4 * (i * count + index), true);
    return column;
  });
}
