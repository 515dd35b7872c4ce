"use strict";

const by = (id) => document.getElementById(id);
const contents = { one: null, other: null };
let token = "", system = null;

// ------------------------------------------------------------------ the service

async function ask(path, options = {}) {
  const headers = { Authorization: `Bearer ${token}` };
  const answer = await fetch(`/v1/${path}`, { ...options, headers });
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    const message = content.error ? content.error.message : `the service answered ${answer.status}`;
    throw Object.assign(new Error(message), { status: answer.status });
  }
  return content;
}

function complain(error) {
  by("problem").textContent = error ? error.message : "";
  by("problem").hidden = !error;
}

async function open_() {
  try {
    system = await ask("system");
  } catch (error) {
    const login = error.status === 401;
    by("login").hidden = !login;
    complain(login && !token ? null : error);
    return;
  }
  complain(null);
  by("login").hidden = true;
  by("work").hidden = false;
  const speech = system.modality === "speech";
  for (const place of document.querySelectorAll(".what")) {
    place.textContent = speech ? "voice" : "face";
  }
  chooser("one", speech);
  chooser("other", speech);
  promise();
  draw(null);
}

// ------------------------------------------------------------------ two files

function element(kind, attributes = {}, text = "") {
  const made = document.createElement(kind);
  Object.assign(made, attributes);
  made.textContent = text;
  return made;
}

function chooser(side, speech) {
  const box = by(side);
  const input = element("input", { type: "file", accept: speech ? "audio/*,.flac" : "image/*" });
  input.setAttribute("aria-label", `a file for the ${side === "one" ? "first" : "second"}`);
  input.addEventListener("change", () => {
    if (input.files.length) take(side, input.files[0], speech);
  });
  box.append(input);
  if (speech && navigator.mediaDevices) box.append(recorder(side));
  const shown = element(speech ? "audio" : "img", speech ? { controls: true } : { alt: "" });
  shown.hidden = true;
  shown.className = "shown";
  box.append(shown);
}

function take(side, blob, speech) {
  contents[side] = blob;
  const shown = by(side).querySelector(".shown");
  if (shown.src) URL.revokeObjectURL(shown.src);
  shown.src = URL.createObjectURL(blob);
  shown.hidden = false;
  by("compare").disabled = !(contents.one && contents.other);
  by("result").hidden = true;
  complain(null);
}

function recorder(side) {
  const button = element("button", { type: "button", className: "record" }, "Record");
  let running = null;
  button.addEventListener("click", async () => {
    try {
      if (running) {
        const done = running;
        running = null;
        button.textContent = "Record again";
        take(side, await done(), true);
      } else {
        running = await record();
        button.textContent = "Stop";
      }
    } catch (error) {
      running = null;
      button.textContent = "Record";
      complain(new Error(`the microphone cannot be used: ${error.message}`));
    }
  });
  return button;
}

// Begins to record; what it returns ends it and gives a WAV file. Echo cancellation and the like are
// off: they change the voice.
async function record() {
  const plain = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  const stream = await navigator.mediaDevices.getUserMedia({ audio: plain });
  const context = new AudioContext();
  await context.audioWorklet.addModule("/recorder.js");
  const blocks = [];
  const node = new AudioWorkletNode(context, "recorder");
  node.port.onmessage = (message) => blocks.push(message.data);
  context.createMediaStreamSource(stream).connect(node);
  return async () => {
    for (const track of stream.getTracks()) track.stop();
    await context.close();
    return wav(blocks, context.sampleRate);
  };
}

function wav(blocks, rate) {
  const count = blocks.reduce((sum, block) => sum + block.length, 0);
  const view = new DataView(new ArrayBuffer(44 + 2 * count));
  const text = (at, word) => [...word].forEach((c, n) => view.setUint8(at + n, c.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * count, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 2 * count, true);
  let at = 44;
  for (const block of blocks) {
    for (const sample of block) {
      view.setInt16(at, Math.round(32767 * Math.max(-1, Math.min(1, sample))), true);
      at += 2;
    }
  }
  return new Blob([view], { type: "audio/wav" });
}

// ------------------------------------------------------------------ the answer

async function compare() {
  const form = new FormData();
  form.append("one", contents.one, "one");
  form.append("other", contents.other, "other");
  by("compare").disabled = true;
  by("result").hidden = true;
  complain(null);
  try {
    const found = await ask("compare", { method: "POST", body: form });
    const verdict = by("verdict");
    verdict.className = found.accept ? "accept" : "reject";
    verdict.textContent = found.accept ? "Accepted as one person" : "Rejected: not shown to be one";
    const ratio = found.llr === null ? "" : `, log-likelihood ratio ${found.llr.toFixed(2)}`;
    by("figures").textContent =
      `${found.kind} ${found.score.toFixed(4)}${ratio}; threshold ${found.threshold.toFixed(4)}`;
    const notes = [...found.notes, ...among(found.score)];
    by("notes").replaceChildren(...notes.map((note) => element("li", {}, note)));
    by("result").hidden = false;
    draw(found.score);
  } catch (error) {
    complain(error);
    draw(null);
  } finally {
    by("compare").disabled = false;
  }
}

const sum = (counts) => counts.reduce((total, count) => total + count, 0);
const percent = (share, digits = 2) => `${(100 * share).toFixed(digits)} %`;

function among(score) {
  const held = system.histogram;
  if (!held) return [];
  const higher = (counts) => sum(counts.filter((_, n) => held.edges[n + 1] > score)) / sum(counts);
  return [
    `of the measured pairs about ${percent(higher(held.impostors))} of two people and ` +
      `${percent(higher(held.targets), 0)} of one person scored as high`,
  ];
}

function promise() {
  const between = (interval, digits) =>
    interval ? ` (95 % interval ${interval.map((x) => percent(x, digits)).join(" to ")})` : "";
  const rows = [
    ["Two people, accepted", percent(system.far) + between(system.far_interval, 2)],
    ["One person, accepted", percent(system.tar, 1) + between(system.tar_interval, 1)],
    ["These rates are", system.mark],
    ["Scores", `${system.kind}, threshold ${system.threshold.toFixed(4)}`],
    ["Encoder", system.encoder.slice(0, 16)],
  ];
  by("promise").replaceChildren(
    ...rows.flatMap(([term, text]) => [element("dt", {}, term), element("dd", {}, text)]),
  );
}

// ------------------------------------------------------------------ the histogram

function draw(score) {
  const held = system.histogram, picture = by("histogram");
  picture.replaceChildren();
  if (!held) return;
  const [left, right, top, bottom] = [10, 710, 34, 262];
  const all = [held.edges[0], held.edges[held.edges.length - 1], system.threshold];
  if (score !== null) all.push(score);
  const low = Math.min(...all), high = Math.max(...all);
  const x = (value) => left + ((value - low) / (high - low || 1)) * (right - left);
  const shares = [held.impostors, held.targets].map((counts) => {
    const total = sum(counts);
    return counts.map((count) => count / total);
  });
  const most = Math.max(...shares.flat());
  const y = (share) => bottom - (share / most) * (bottom - top);
  const put = (kind, attributes, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    picture.append(made);
  };
  shares.forEach((heights, n) => {
    const steps = heights.map((share, bin) => `V${y(share)}H${x(held.edges[bin + 1])}`).join("");
    put("path", { class: n ? "same" : "other", d: `M${x(held.edges[0])} ${bottom}${steps}V${bottom}Z` });
  });
  put("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom });
  for (let n = 0; n <= 6; n++) {
    const value = low + (n / 6) * (high - low);
    const anchor = n === 0 ? "start" : n === 6 ? "end" : "middle";
    put("text", { x: x(value), y: bottom + 16, "text-anchor": anchor }, value.toFixed(2));
  }
  const mark = (value, name, style, height, beside = null) => {
    put("line", { class: style, x1: x(value), x2: x(value), y1: height + 4, y2: bottom });
    let anchor = x(value) < 100 ? "start" : x(value) > 620 ? "end" : "middle";
    // a line that is near and higher would cross the name
    const gap = beside === null ? 0 : x(value) - x(beside);
    const near = gap !== 0 && Math.abs(gap) < 80;
    if (near) anchor = gap < 0 ? (x(value) < 100 ? anchor : "end") : x(value) > 620 ? anchor : "start";
    put("text", { class: "strong", x: x(value), y: height, "text-anchor": anchor }, name);
  };
  mark(system.threshold, `threshold ${system.threshold.toFixed(3)}`, "threshold", 28, score);
  if (score !== null) mark(score, `score ${score.toFixed(3)}`, "score", 12);
  put("text", { x: left, y: 292 }, "orange: pairs of two people; blue: pairs of one person");
  by("caption").textContent =
    `The scores of ${sum(held.impostors).toLocaleString("en")} pairs of two people and ` +
    `${sum(held.targets).toLocaleString("en")} pairs of one person that this threshold was measured on.`;
}

// ------------------------------------------------------------------ the beginning

by("compare").addEventListener("click", compare);
by("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = by("token").value.trim();
  open_();
});
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem("token", given);
  history.replaceState(null, "", location.pathname); // not in the history, nor in a screenshot
}
token = sessionStorage.getItem("token") || "";
open_();
