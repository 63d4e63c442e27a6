/** The microphone: blocks of samples for a recording or a stream, and WAV files of them. */

const NO_MICROPHONE =
  "The microphone is only open to pages that come over HTTPS or from this very machine (localhost).";

/** What went wrong with a microphone, and what to do. */
function explained(error) {
  if (error.name === "NotAllowedError")
    return "The microphone is blocked. Allow it for this page in the browser's address bar, then try again.";
  if (error.name === "NotFoundError") return "No microphone was found. Connect one, then try again.";
  if (error.name === "NotReadableError")
    return "The microphone is in use by another program. Close that, then try again.";
  return `The microphone cannot be opened (${error.message}).`;
}

/**
 * Open the microphone.
 *
 * @param {(block: {start: number, samples: Float32Array}) => void} onBlock about ten times a second.
 * @param {() => void} onLost the device went away.
 * @returns `{sampleRate, analyser, stop}`
 */
export async function openMicrophone(onBlock, onLost) {
  if (!navigator.mediaDevices?.getUserMedia) throw new Error(NO_MICROPHONE);
  let media;
  try {
    // sounds are wanted as they are, not as a telephone would clean them
    const plain = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    media = await navigator.mediaDevices.getUserMedia({ audio: plain });
  } catch (error) {
    throw new Error(explained(error));
  }
  const context = new AudioContext();
  try {
    await context.audioWorklet.addModule(new URL("worklet.js", import.meta.url));
    await context.resume();
  } catch (error) {
    media.getTracks().forEach((track) => track.stop());
    context.close();
    throw new Error(explained(error));
  }
  const source = context.createMediaStreamSource(media);
  const gatherer = new AudioWorkletNode(context, "gatherer", { numberOfOutputs: 1 });
  const analyser = new AnalyserNode(context, { fftSize: 2048, smoothingTimeConstant: 0 });
  source.connect(analyser);
  // nodes work only on the way to the speakers; this one is silent
  source.connect(gatherer).connect(context.destination);
  gatherer.port.onmessage = ({ data }) => onBlock(data);
  const [track] = media.getAudioTracks();
  track.addEventListener("ended", onLost);
  return {
    sampleRate: context.sampleRate,
    name: track.label,
    analyser,
    stop() {
      track.removeEventListener("ended", onLost);
      gatherer.port.onmessage = null;
      media.getTracks().forEach((each) => each.stop());
      context.close();
    },
  };
}

/** Samples as 16-bit integers. */
export function toPcm(samples) {
  const pcm = new Int16Array(samples.length);
  for (let i = 0; i < samples.length; i++) pcm[i] = Math.round(Math.max(-1, Math.min(1, samples[i])) * 32767);
  return pcm;
}

/** Level of samples in dB below a full-scale square wave. */
export function level(samples) {
  let power = 0;
  for (const sample of samples) power += sample * sample;
  return Math.max(-60, 10 * Math.log10(power / samples.length + 1e-12));
}

/** 16-bit mono WAV of blocks of 16-bit samples. */
export function wav(blocks, sampleRate) {
  const bytes = blocks.reduce((sum, block) => sum + block.byteLength, 0);
  const head = new DataView(new ArrayBuffer(44));
  const text = (at, letters) => [...letters].forEach((letter, i) => head.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  head.setUint32(4, 36 + bytes, true);
  text(8, "WAVEfmt ");
  head.setUint32(16, 16, true);
  head.setUint16(20, 1, true);
  head.setUint16(22, 1, true);
  head.setUint32(24, sampleRate, true);
  head.setUint32(28, sampleRate * 2, true);
  head.setUint16(32, 2, true);
  head.setUint16(34, 16, true);
  text(36, "data");
  head.setUint32(40, bytes, true);
  return new Blob([head, ...blocks], { type: "audio/wav" });
}
