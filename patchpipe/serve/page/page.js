// The playground: asks for pictures and clips as any client does, and shows them as they come.

const PREVIEWS = 6;
const SIZES = [[1, 1], [4, 3], [3, 4], [16, 9], [9, 16]];
const SHOWN = 12; // requests of the queue
const KEPT = 60; // pictures in the gallery
const at = (id) => document.getElementById(id);
const form = at("ask");
let state = null;
let running = null; // while something is painted: an AbortController, with the request's id, step and deadline

// -- talking to the service ------------------------------------------------------------------

async function call(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) {
    await askForKey();
    return call(path, options);
  }
  if (!answer.ok) throw new Error(await reason(answer));
  return answer;
}

async function reason(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the service answered ${answer.status}`;
  }
}

let asking = null;
function askForKey() {
  sessionStorage.removeItem("key");
  asking ??= new Promise((resolve) => {
    at("keyDialog").showModal();
    at("keyDialog").addEventListener("close", () => {
      sessionStorage.setItem("key", at("key").value);
      asking = null;
      resolve();
    }, { once: true });
  });
  return asking;
}

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
      if (data.length) yield JSON.parse(data.join("\n"));
    }
  }
}

// -- painting --------------------------------------------------------------------------------

function asked() {
  const fields = { prompt: form.prompt.value.trim(), model: form.model.value.split("|")[0], size: form.size.value };
  if (form.negative_prompt.value.trim()) fields.negative_prompt = form.negative_prompt.value.trim();
  for (const name of ["num_inference_steps", "seed", "deadline_s"])
    if (form[name].value !== "") fields[name] = Number(form[name].value);
  if (kind() === "clip" && form.num_frames.value !== "") fields.num_frames = Number(form.num_frames.value);
  if (fields.seed === undefined) fields.seed = crypto.getRandomValues(new Uint32Array(1))[0];
  return fields;
}

async function paint() {
  const fields = asked();
  const [width, height] = fields.size.split("x").map(Number);
  running = Object.assign(new AbortController(), { began: performance.now(), deadline: fields.deadline_s });
  busy(true);
  say("Waiting for its turn …");
  at("stage").scrollIntoView({ block: "nearest" }); // on a phone it lies below the form
  try {
    at("canvas").style.aspectRatio = `${width} / ${height}`;
    await (kind() === "clip" ? paintClip(fields) : paintPicture(fields));
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else complain(error.message);
  } finally {
    running = null;
    busy(false);
  }
}

async function paintPicture(fields) {
  const body = JSON.stringify({ ...fields, stream: true, partial_images: PREVIEWS, progress: true });
  const headers = { "content-type": "application/json" };
  const answer = await call("/v1/images/generations", { method: "POST", headers, body, signal: running.signal });
  running.id = answer.headers.get("x-request-id");
  for await (const event of eventsOf(answer)) {
    if (event.error) throw new Error(event.error.message);
    if (event.type === "patchpipe.progress") advance(event.step, event.total);
    else if (event.type === "image_generation.partial_image") show(blobOf(event), fields, true);
    else if (event.type === "image_generation.completed") {
      const blob = blobOf(event);
      show(blob, fields, false);
      finish(blob, fields, `${event.seconds.toFixed(1)} s${inTime()} · seed ${event.seed}`);
      return;
    }
  }
  throw new Error("the connection ended before the picture was there");
}

async function paintClip(fields) {
  const body = JSON.stringify(fields);
  const headers = { "content-type": "application/json" };
  let clip = await (await call("/v1/videos", { method: "POST", headers, body, signal: running.signal })).json();
  const path = `/v1/videos/${clip.id}`;
  running.id = clip.id;
  const { signal } = running;
  signal.addEventListener("abort", () => call(path, { method: "DELETE" }).catch(() => {}), { once: true });
  while (clip.status === "queued" || clip.status === "in_progress") {
    await new Promise((resolve) => setTimeout(resolve, 700));
    clip = await (await call(path, { signal })).json();
    if (clip.status === "in_progress") advance(clip.progress, 100);
  }
  if (clip.status === "failed") throw new Error(clip.error.message);
  const blob = await (await call(`${path}/content`, { signal })).blob();
  const small = await (await call(`${path}/content?variant=thumbnail`, { signal })).blob();
  show(blob, fields, false);
  finish(blob, fields, `${clip.seconds} s long${inTime()} · seed ${fields.seed}`, small);
}

function blobOf(event) {
  const bytes = Uint8Array.from(atob(event.b64_json), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: `image/${event.output_format}` });
}

// -- showing ---------------------------------------------------------------------------------

function show(blob, fields, coming) {
  const isClip = blob.type.startsWith("video/");
  const shown = document.createElement(isClip ? "video" : "img");
  if (isClip) Object.assign(shown, { controls: true, loop: true, autoplay: true, muted: true });
  else shown.alt = coming ? `A picture on the way: ${fields.prompt}` : fields.prompt;
  shown.className = coming ? "coming" : "";
  shown.src = URL.createObjectURL(blob);
  const ready = () => {
    for (const other of [...at("canvas").children])
      if (other !== shown) {
        if (other.src) URL.revokeObjectURL(other.src);
        other.remove();
      }
  };
  shown.addEventListener(isClip ? "loadeddata" : "load", ready, { once: true });
  at("canvas").append(shown);
  if (isClip) shown.setAttribute("aria-label", fields.prompt);
}

function advance(step, total) {
  at("progress").max = total ?? 1;
  at("progress").value = step;
  running.step = total === 100 && kind() === "clip" ? `${step} %` : `Step ${step} of ${total ?? "?"}`;
  say(running.step, null);
}

// Where the request stands beside others: its place in the queue, or why nothing moves.
function place() {
  const own = running?.id && [...state.running, ...state.paused, ...state.waiting].find((one) => one.id === running.id);
  if (!own) return;
  if (own.state === "waiting" && !running.step) {
    const others = state.running.length + state.paused.length + state.waiting.length - 1;
    const beside = others ? `${others} ${others === 1 ? "other is" : "others are"} here` : "";
    say(["Waiting for its turn", beside, due(own)].filter(Boolean).join(" · "), null);
  } else if (running.step) {
    const held = own.state === "running" ? "" : own.state === "paused" ? "held while others go first" : "begins anew";
    say([running.step, held, due(own)].filter(Boolean).join(" · "), null);
  }
}

function inTime() {
  if (!running?.deadline) return "";
  const left = running.deadline - (performance.now() - running.began) / 1000;
  return left >= 0 ? " · in time" : ` · ${Math.ceil(-left)} s late`;
}

function finish(blob, fields, text, small = blob) {
  say(text, `The ${blob.type.split("/")[0]} is there: ${text}`);
  const save = at("save");
  if (save.href) URL.revokeObjectURL(save.href);
  save.href = URL.createObjectURL(blob);
  save.download = `${fields.prompt.replace(/\W+/g, "-").slice(0, 40)}-${fields.seed}.${blob.type.split("/")[1]}`;
  save.hidden = false;
  keep({ blob, small, fields, text, made: Date.now() });
}

// Steps are shown and not said: a screen reader would talk all the time.
function say(text, aloud = text) {
  at("caption").textContent = text;
  if (aloud !== null) at("said").textContent = aloud;
}

function complain(text) {
  say("");
  at("problem").textContent = text;
  at("problem").hidden = false;
}

function busy(now) {
  at("paint").disabled = now;
  at("stop").hidden = !now;
  at("progress").hidden = !now;
  if (now) {
    at("problem").hidden = true;
    at("save").hidden = true;
    at("progress").removeAttribute("value");
  }
}

// -- this machine ----------------------------------------------------------------------------

const kind = () => form.model.value.split("|")[1] ?? "picture";

async function look() {
  try {
    state = await (await call("/v1/state")).json();
    const pill = at("health");
    pill.textContent = state.draining ? "shutting down" : state.ready ? "ready" : "starting again";
    pill.className = `pill ${state.ready ? "good" : "bad"}`;
    if (!form.model.options.length) fillModels();
    drawModels();
    drawQueue();
    place();
  } catch (error) {
    at("health").textContent = "not reachable";
    at("health").className = "pill bad";
  }
}

function fillModels() {
  for (const model of state.models.filter((one) => one.kind !== "edit"))
    form.model.add(new Option(model.kind === "clip" ? `${model.id} (clips)` : model.id, `${model.id}|${model.kind}`));
  fillFields();
}

function fillFields() {
  const model = state.models.find((one) => `${one.id}|${one.kind}` === form.model.value);
  if (!model) return;
  const usual = model.usual;
  const [height, width] = [usual.height ?? 1024, usual.width ?? 1024];
  form.size.replaceChildren();
  const sizes = [[width, height], ...SIZES.map(([wide, high]) => fit(wide / high, width * height))];
  for (const size of new Set(sizes.map((one) => one.join("x")))) form.size.add(new Option(size.replace("x", " × "), size));
  form.num_inference_steps.value = usual.num_inference_steps ?? "";
  form.num_inference_steps.max = state.limits.steps;
  form.num_frames.value = usual.num_frames ?? "";
  at("framesField").hidden = model.kind !== "clip";
}

function fit(shape, area) {
  const side = (value) => Math.max(16, Math.round(value / 16) * 16);
  return [side(Math.sqrt(area * shape)), side(Math.sqrt(area / shape))];
}

function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

function drawModels() {
  at("models").replaceChildren(...state.models.map((model) => {
    const name = model.kind === "edit" ? `${model.id} (edits)` : model.id;
    const card = element("div", "", "model");
    card.append(element("strong", name), element("span", `${model.pipeline} · ${model.layout}`, "dim"));
    if (model.cause) card.append(element("p", model.cause, "problem"));
    const devices = element("div", "", "devices");
    const own = state.running.filter((one) => one.model === name);
    model.devices.forEach((device, rank) => {
      const busy = model.elastic ? own.some((one) => one.devices.includes(rank)) : own.length;
      const word = !model.ready ? "lost" : busy ? "busy" : "idle";
      const known = model.devices.indexOf(device) === model.devices.lastIndexOf(device) ? device : `${device} ${rank}`;
      devices.append(element("span", `${known} ${word}`, `device ${word}`));
    });
    card.append(devices);
    return card;
  }));
}

function due(one) {
  if (one.due === null) return "";
  return Math.round(one.due) >= 0 ? `due in ${time(one.due)}` : `${time(-one.due)} late`;
}

function time(seconds) {
  const whole = Math.round(seconds);
  return whole < 120 ? `${whole} s` : whole < 7200 ? `${Math.round(whole / 60)} min` : `${Math.round(whole / 3600)} h`;
}

function drawQueue() {
  const all = [...state.running, ...state.paused, ...state.waiting];
  const rows = all.slice(0, SHOWN).map(drawRequest);
  if (all.length > SHOWN) rows.push(element("li", `and ${all.length - SHOWN} more`, "dim"));
  at("queue").replaceChildren(...(rows.length ? rows : [element("li", "Nothing waits.", "dim")]));
}

function drawRequest(one) {
  const step = `step ${one.step} of ${one.steps ?? "?"}`;
  const how = { running: step, paused: step, waiting: `for ${time(one.waited)}` }[one.state];
  const row = element("li", "", one.state);
  const word = { running: "runs", paused: "held", waiting: "waits" }[one.state];
  const whose = one.id === running?.id ? `${one.model} · yours` : one.model;
  row.append(element("span", word, "state"), element("strong", whose), element("span", one.kind, "dim"));
  row.append(element("span", how), element("span", due(one), one.due < 0 ? "late" : "dim"));
  if (one.ran !== null && one.steps) {
    const done = element("span", "", "done");
    done.style.width = `${(100 * one.step) / one.steps}%`;
    row.append(done);
  }
  return row;
}

// -- gallery ---------------------------------------------------------------------------------

const database = new Promise((resolve) => {
  const opening = indexedDB.open("patchpipe", 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore("pictures", { keyPath: "made" });
  opening.onsuccess = () => resolve(opening.result);
  opening.onerror = () => resolve(null); // a private window: the gallery lives as long as the page
});
const here = new Map();

async function stored(mode, work) {
  const db = await database;
  if (!db) return null;
  return new Promise((resolve) => {
    const request = work(db.transaction("pictures", mode).objectStore("pictures"));
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => resolve(null);
  });
}

async function keep(picture) {
  here.set(picture.made, picture);
  await stored("readwrite", (pictures) => pictures.put(picture));
  const old = [...here.keys()].sort((one, other) => other - one).slice(KEPT);
  for (const made of old) {
    here.delete(made);
    await stored("readwrite", (pictures) => pictures.delete(made));
  }
  drawGallery();
}

function drawGallery() {
  const pictures = [...here.values()].sort((one, other) => other.made - one.made);
  at("gallery").hidden = !pictures.length;
  for (const image of at("pictures").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  at("pictures").replaceChildren(...pictures.map((picture) => {
    const item = element("li", "");
    const button = element("button", "");
    button.type = "button";
    const image = new Image();
    image.src = URL.createObjectURL(picture.small);
    image.alt = picture.fields.prompt;
    button.append(image);
    button.addEventListener("click", () => recall(picture));
    item.append(button, element("p", picture.fields.prompt));
    return item;
  }));
}

function recall(picture) {
  if (running) return;
  const { fields } = picture;
  form.prompt.value = fields.prompt;
  form.negative_prompt.value = fields.negative_prompt ?? "";
  const model = [...form.model.options].find((one) => one.value.split("|")[0] === fields.model);
  if (model) form.model.value = model.value;
  fillFields();
  if (![...form.size.options].some((one) => one.value === fields.size))
    form.size.add(new Option(fields.size.replace("x", " × "), fields.size));
  form.size.value = fields.size;
  form.seed.value = fields.seed;
  if (fields.num_inference_steps) form.num_inference_steps.value = fields.num_inference_steps;
  const [width, height] = fields.size.split("x").map(Number);
  at("canvas").style.aspectRatio = `${width} / ${height}`;
  show(picture.blob, fields, false);
  say(picture.text);
  window.scrollTo({ top: 0 });
}

// -- begin -----------------------------------------------------------------------------------

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) paint();
});
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
at("stop").addEventListener("click", () => running?.abort());
at("dice").addEventListener("click", () => {
  form.seed.value = crypto.getRandomValues(new Uint32Array(1))[0];
});
form.model.addEventListener("change", fillFields);
at("clear").addEventListener("click", async () => {
  if (!confirm("Remove all pictures of the gallery from this browser?")) return;
  here.clear();
  await stored("readwrite", (pictures) => pictures.clear());
  drawGallery();
});
for (const picture of (await stored("readonly", (pictures) => pictures.getAll())) ?? []) here.set(picture.made, picture);
drawGallery();
await look();
setInterval(() => document.hidden || asking || look(), 1000);
