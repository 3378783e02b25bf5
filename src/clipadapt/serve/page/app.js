// The page of `clipadapt serve`: predictions, comparison, search and explanations, all through the server's own API.
// Whatever comes from outside (class names, file names, messages) enters the page as text, never as HTML.

const CLASSES = 5; // shown of each prediction
const HITS = 24;
const AT_ONCE = 4; // images under way together: enough for the server to put into one batch
const TRIES = 5; // of one request while the server is busy
const KEY = "clipadapt-key";

const $ = (id) => document.getElementById(id);
const element = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
const copyOf = (template) => $(template).content.firstElementChild.cloneNode(true);
const count = (number, one, many = `${one}s`) => `${number} ${number === 1 ? one : many}`;

/** What a button does, and its label for those who do not see the rest of the page. */
function arm(button, label, action) {
  button.ariaLabel = label;
  button.addEventListener("click", action);
}

let server = { data: [], indexes: [] }; // what /v1/models says

// -- requests --------------------------------------------------------------------------------------------------------

const answerTo = async (path, body, signal) => (await request(path, body, signal)).json();

/** The response to a GET, or to a POST of `body` (a form or an object); throws an Error whose message is for the user. */
async function request(path, body, signal) {
  for (let tries = 1; ; tries += 1) {
    const key = sessionStorage.getItem(KEY);
    const response = await send(path, body, key, signal);
    if (response.ok) return response;
    if (response.status === 401) {
      if (key === sessionStorage.getItem(KEY)) await askForKey(key !== null);
    } else if (response.status === 503 && tries < TRIES) {
      const seconds = Number(response.headers.get("Retry-After")) || 1;
      $("notice").textContent = `The server is busy. Trying again in ${count(seconds, "second")}.`;
      await new Promise((done) => setTimeout(done, 1000 * seconds));
      $("notice").textContent = "";
    } else {
      throw new Error(await reasonOf(response));
    }
  }
}

async function send(path, body, key, signal) {
  const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
  if (body && !(body instanceof FormData)) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(body);
  }
  try {
    return await fetch(path, { method: body ? "POST" : "GET", headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
}

async function reasonOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}.`;
  }
}

let asking = null; // the question for a key that several refused requests wait for

function askForKey(refused) {
  asking ??= new Promise((done, fail) => {
    $("key-status").textContent = refused ? "The server does not accept that key." : "This server asks for a key.";
    $("key-input").value = "";
    $("key").returnValue = "";
    $("key").addEventListener("close", answered, { once: true });
    $("key").showModal();

    function answered() {
      asking = null;
      if ($("key").returnValue !== "use") return fail(new Error("This server asks for an API key."));
      sessionStorage.setItem(KEY, $("key-input").value);
      $("key-forget").hidden = false;
      done();
    }
  });
  return asking;
}

function formOf(values) {
  const form = new FormData();
  for (const [name, value] of Object.entries(values)) {
    for (const one of [value].flat()) form.append(name, one);
  }
  return form;
}

// -- the server and the views ----------------------------------------------------------------------------------------

async function start() {
  $("unreachable").hidden = true;
  $("key-forget").hidden = sessionStorage.getItem(KEY) === null;
  try {
    server = await answerTo("v1/models");
  } catch (error) {
    $("unreachable-why").textContent = error.message;
    $("unreachable").hidden = false;
    return;
  }
  fill($("model"), classifiers());
  fill($("why-model"), server.data);
  fill($("index"), server.indexes);
  fillOther();
  $("other-field").hidden = classifiers().length < 2;
  $("classify-empty").hidden = classifiers().length > 0;
  $("classify-tools").hidden = classifiers().length === 0;
  $("search-empty").hidden = server.indexes.length > 0;
  $("search-form").hidden = server.indexes.length === 0;
  const lines = [...server.data.map(describeModel), ...server.indexes.map(describeIndex)];
  $("server").replaceChildren(...lines.map((line) => element("li", line)));
}

const classifiers = () => server.data.filter((model) => model.classes.length > 0); // a bare backbone has no classes

function fill(select, things) {
  select.replaceChildren(...things.map(({ id }) => new Option(id, id)));
}

function fillOther() {
  const before = $("other").value;
  fill($("other"), classifiers().filter(({ id }) => id !== $("model").value));
  $("other").prepend(new Option("no other", ""));
  $("other").value = before === $("model").value ? "" : before;
}

function describeModel({ id, method, classes, revision, multi_label }) {
  const what = method ? `${method}, ${count(classes.length, "class", "classes")}` : "a backbone";
  return `${id}: ${what}${multi_label ? ", several per image" : ""}, revision ${short(revision)}`;
}

const describeIndex = ({ id, images }) => `${id}: an index of ${count(images, "image")}`;

const short = (revision) => (revision ?? "").slice(0, 8);
const modelOf = (id) => server.data.find((model) => model.id === id);
const searching = () => location.hash === "#search";

function showView() {
  $("classify").hidden = searching();
  $("search").hidden = !searching();
  for (const link of document.querySelectorAll("nav a")) {
    link.ariaCurrent = (link.hash === "#search") === searching() ? "page" : null;
  }
}

// -- classify --------------------------------------------------------------------------------------------------------

const images = []; // {file, card, answers: one for each model that was asked}
let job = newJob();

function newJob() {
  return { queue: [], workers: 0, done: 0, total: 0, stop: new AbortController() };
}

function add(files) {
  const added = [...files].map((file) => ({ file, card: cardOf(file) }));
  images.push(...added);
  $("images").append(...added.map((image) => image.card));
  $("files").value = ""; // so that the same files can be chosen again
  enqueue(added);
}

function cardOf(file) {
  const card = copyOf("card-template");
  card.querySelector(".name").textContent = file.name;
  const image = card.querySelector("img");
  image.src = URL.createObjectURL(file);
  image.addEventListener("error", () => image.removeAttribute("src"));
  arm(card.querySelector(".similar"), `Find images similar to ${file.name}`, () => searchLike(file, file.name));
  return card;
}

function enqueue(added) {
  if (job.workers === 0) job = newJob();
  job.queue.push(...added);
  job.total += added.length;
  for (const image of added) settle(image, askedModels().map((model) => ({ model })));
  while (job.workers < Math.min(AT_ONCE, job.total - job.done)) work(job);
  report();
}

async function work(mine) {
  mine.workers += 1;
  for (let image; (image = mine.queue.shift()); ) {
    const answers = await Promise.all(askedModels().map((model) => classify(image.file, model, mine.stop.signal)));
    if (mine !== job) return; // cancelled, cleared, or asked again
    settle(image, answers);
    mine.done += 1;
    report();
  }
  mine.workers -= 1;
}

const askedModels = () => [$("model").value, $("other").value].filter(Boolean);

/** {model, revision, predictions} or {model, error}; while it is under way, the answer is {model}. */
async function classify(file, model, signal) {
  try {
    const form = formOf({ image: file, model, top: CLASSES });
    const { revision, results } = await answerTo("v1/classify", form, signal);
    return { model, revision, ...results[0] };
  } catch (error) {
    return { model, error: error.message };
  }
}

function stop() {
  job.stop.abort();
  job = newJob();
}

function askAgain() {
  stop();
  enqueue(images);
}

function cancel() {
  stop();
  const cancelled = askedModels().map((model) => ({ model, error: "Cancelled." }));
  const waits = ({ answers }) => answers.every(({ predictions, error }) => !predictions && !error);
  for (const image of images.filter(waits)) settle(image, cancelled);
  report();
}

function clear() {
  stop();
  for (const { card } of images.splice(0)) {
    URL.revokeObjectURL(card.querySelector("img").src);
    card.remove();
  }
  report();
  $("files").focus();
}

function settle(image, answers) {
  const { file, card } = Object.assign(image, { answers });
  card.querySelector(".columns").replaceChildren(...answers.map((answer) => columnOf(file, answer)));
  const tops = answers.map(({ predictions }) => predictions && (predictions[0]?.class ?? "no class"));
  const known = tops.length > 1 && tops.every((top) => top !== undefined);
  const differ = known && tops[0] !== tops[1];
  card.classList.toggle("differ", differ);
  card.querySelector(".similar").hidden = server.indexes.length === 0 || answers.every((answer) => answer.error);
  card.querySelector(".verdict").textContent = !known
    ? tops.length > 1 ? "\u00a0" : ""
    : differ ? `≠ They differ: ${tops[0]} or ${tops[1]}` : `= They agree: ${tops[0]}`;
}

/** One model's answer to one image; while it is under way, the place that it will take. */
function columnOf(file, { model, revision, predictions, error }) {
  const column = copyOf("column-template");
  column.querySelector(".model").textContent = model;
  column.querySelector(".revision").textContent = short(revision);
  column.querySelector(".error").textContent = error ?? "";
  column.querySelector(".none").hidden = predictions?.length !== 0;
  const rows = predictions ?? Array(error ? 0 : Math.min(CLASSES, modelOf(model).classes.length)).fill({});
  column.querySelector(".bars").append(...rows.map(barOf));
  const why = column.querySelector(".why");
  why.hidden = error !== undefined;
  why.disabled = predictions === undefined;
  const show = () => openWhy(file, file.name, predictions[0]?.class ?? "", model);
  arm(why, `Why? Heat map of ${file.name} by ${model}`, show);
  return column;
}

function barOf({ class: name, probability }) {
  const bar = copyOf("bar-template");
  if (name === undefined) return bar;
  bar.querySelector(".class").textContent = bar.querySelector(".class").title = name;
  bar.querySelector(".bar span").style.width = `${100 * probability}%`;
  bar.querySelector(".value").textContent = `${(100 * probability).toFixed(1)} %`;
  return bar;
}

function report() {
  const running = job.done < job.total;
  $("progress").max = Math.max(1, job.total);
  $("progress").value = job.done;
  $("cancel").disabled = !running;
  $("clear").disabled = images.length === 0;
  $("classify-status").textContent = running ? `${job.done} of ${count(job.total, "image")} …` : summary();
}

function summary() {
  if (images.length === 0) return "No images yet.";
  const failed = images.filter(({ answers }) => answers.some((answer) => answer.error)).length;
  const differ = images.filter(({ card }) => card.classList.contains("differ")).length;
  return [
    count(images.length, "image"),
    failed ? `${failed} without an answer` : "",
    $("other").value ? `different answers for ${differ}` : "",
  ].filter(Boolean).join(", ") + ".";
}

// -- search ----------------------------------------------------------------------------------------------------------

let like = null; // the image to search by
let lastSearch = new AbortController();

function setLike(image, name) {
  URL.revokeObjectURL($("like-image").src);
  like = image;
  $("like").hidden = image === null;
  $("like-file").value = "";
  if (image === null) return;
  $("like-name").textContent = name;
  $("like-image").src = URL.createObjectURL(image);
}

function searchLike(image, name) {
  location.hash = "#search";
  showView();
  setLike(image, name);
  $("text").value = $("minus").value = "";
  search();
  $("search-status").scrollIntoView({ block: "center" });
}

async function search() {
  const text = $("text").value.trim();
  const minus = $("minus").value.split(",").map((word) => word.trim()).filter(Boolean);
  if (!text && !like) return found("Describe in words what you are looking for, or choose an image.");
  lastSearch.abort();
  const mine = (lastSearch = new AbortController());
  const index = $("index").value;
  const wanted = { index, texts: text ? [text] : [], minus, top: HITS };
  if ($("where").value.trim()) wanted.where = $("where").value.trim();
  found("Searching …");
  try {
    const body = like ? formOf({ ...wanted, image: like }) : wanted;
    const { hits } = await answerTo("v1/search", body, mine.signal);
    found(hits.length ? `${count(hits.length, "image")}, the best first.` : "No image fits.");
    showHits(hits.map((hit) => hitOf(index, hit, text, mine.signal)));
  } catch (error) {
    if (error.name === "AbortError") return;
    found(error.message, true);
    showHits([]);
  }
}

function found(message, failed = false) {
  $("search-status").textContent = message;
  $("search-status").classList.toggle("failed", failed);
}

function showHits(cards) {
  for (const image of $("hits").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  $("hits").replaceChildren(...cards);
}

function hitOf(index, { id, score, name, facts }, text, signal) {
  const card = copyOf("hit-template");
  const file = name.split(/[\\/]/).pop();
  card.querySelector(".name").textContent = file;
  card.querySelector(".name").title = name;
  card.querySelector(".score").textContent = `score ${score.toFixed(3)}`;
  const known = Object.entries(facts).filter(([, value]) => value !== null);
  card.querySelector(".facts").textContent = known.map(([key, value]) => `${key}: ${value}`).join(", ");
  loadThumbnail();
  return card;

  async function loadThumbnail() {
    try {
      const path = `v1/indexes/${encodeURIComponent(index)}/images/${id}`;
      const image = await (await request(path, null, signal)).blob();
      card.querySelector("img").src = URL.createObjectURL(image);
      arm(card.querySelector(".similar"), `More like ${file}`, () => searchLike(image, file));
      arm(card.querySelector(".why"), `Why? Heat map of ${file}`, () => openWhy(image, file, text));
      for (const button of card.querySelectorAll("button")) button.disabled = false;
    } catch (error) {
      if (error.name !== "AbortError") card.querySelector(".facts").textContent = error.message;
    }
  }
}

// -- why -------------------------------------------------------------------------------------------------------------

const SCALE = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]; // viridis, low to high
let asked = null; // the image that the dialog is about
let heat = null; // {bitmap, box, scores, low, high}: what it shows
let lastWhy = null; // the question whose answer it waits for

function openWhy(image, name, text, model = $("model").value || server.data[0].id) {
  asked = image;
  $("why-title").textContent = `Why? ${name}`;
  $("why-model").value = model;
  $("why-text").value = text;
  fillClasses();
  heat = null;
  draw();
  $("why-table").replaceChildren();
  $("why-image").ariaLabel = "No heat map yet";
  $("why-status").textContent = "Choose a class, or write any text.";
  $("why").showModal();
  explain();
}

function fillClasses() {
  fill($("why-classes"), modelOf($("why-model").value).classes.map((id) => ({ id })));
}

async function explain() {
  const [image, model, text] = [asked, $("why-model").value, $("why-text").value.trim()];
  if (!text) return;
  const mine = (lastWhy = Symbol());
  const wording = modelOf(model).classes.includes(text) ? "class" : "text";
  $("why-status").textContent = "Looking at the patches …";
  try {
    const form = formOf({ image: image, model, [wording]: text });
    const { box, scores, score } = await answerTo("v1/explain", form);
    const bitmap = await createImageBitmap(image);
    if (mine !== lastWhy) return;
    heat = { bitmap, box, scores, low: Math.min(...scores.flat()), high: Math.max(...scores.flat()) };
    $("why-low").textContent = heat.low.toFixed(2);
    $("why-high").textContent = heat.high.toFixed(2);
    $("why-status").textContent = inWords(text, score);
    $("why-image").ariaLabel = `Heat map. ${inWords(text, score)}`;
    showNumbers();
    draw();
  } catch (error) {
    if (mine === lastWhy) $("why-status").textContent = error.message;
  }
}

function inWords(text, score) {
  const place = (value) => {
    const row = heat.scores.findIndex((line) => line.includes(value));
    return `row ${row + 1}, column ${heat.scores[row].indexOf(value) + 1} (${value.toFixed(2)})`;
  };
  return `Similarity to “${text}”: ${score.toFixed(2)} for the whole image; ` +
    `highest at ${place(heat.high)}, lowest at ${place(heat.low)}.`;
}

function showNumbers() {
  const table = $("why-table");
  const header = (text, scope) => Object.assign(element("th", text), { scope });
  table.replaceChildren();
  table.createCaption().textContent = "Similarity of each patch to the text; row 1, column 1 is at the top left.";
  const head = table.createTHead().insertRow();
  head.append(header("", "col"), ...heat.scores[0].map((_, column) => header(column + 1, "col")));
  const body = table.createTBody();
  heat.scores.forEach((line, index) => {
    const row = body.insertRow();
    row.append(header(index + 1, "row"));
    for (const value of line) row.insertCell().textContent = value.toFixed(2);
  });
}

function draw() {
  const canvas = $("why-image");
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (heat === null) return;
  const { bitmap, box } = heat;
  const zoom = 640 / Math.max(bitmap.width, bitmap.height);
  const [width, height] = [canvas.width, canvas.height] = [bitmap.width * zoom, bitmap.height * zoom].map(Math.round);
  const opacity = $("why-opacity").value / 100;
  context.drawImage(bitmap, 0, 0, width, height);
  context.globalAlpha = Math.min(1, 2 * opacity); // the image's own colours would be taken for heat
  context.globalCompositeOperation = "saturation";
  context.fillRect(0, 0, width, height);
  context.globalCompositeOperation = "source-over";
  context.globalAlpha = opacity;
  const [left, top, right, bottom] = box; // most backbones see the middle part only
  context.drawImage(heatMap(), left * width, top * height, (right - left) * width, (bottom - top) * height);
}

/** A canvas of one pixel for each patch. */
function heatMap() {
  const { scores, low, high } = heat;
  const canvas = document.createElement("canvas");
  canvas.width = scores[0].length;
  canvas.height = scores.length;
  paint(canvas, scores.flat().map((value) => (value - low) / (high - low || 1)));
  return canvas;
}

/** Give the pixels of `canvas`, row by row, the colours of `values` in 0..1. */
function paint(canvas, values) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  values.forEach((value, pixel) => {
    const at = value * (SCALE.length - 1);
    const [from, to] = [SCALE[Math.floor(at)], SCALE[Math.ceil(at)]];
    image.data.set([...from.map((part, i) => part + (to[i] - part) * (at % 1)), 255], 4 * pixel);
  });
  context.putImageData(image, 0, 0);
}

// -- what users do ----------------------------------------------------------------------------------------------------

/** Files that were chosen, dropped or pasted: to be classified, or to search by, whichever is shown. */
function take(files) {
  if (files.length === 0) return;
  if (searching()) searchLike(files[0], files[0].name);
  else add(files);
}

const listen = (id, event, action) => $(id).addEventListener(event, action);

listen("unreachable-retry", "click", start);
listen("model", "change", () => { fillOther(); askAgain(); });
listen("other", "change", askAgain);
listen("files", "change", () => take($("files").files));
listen("cancel", "click", cancel);
listen("clear", "click", clear);
listen("search-form", "submit", (event) => { event.preventDefault(); search(); });
listen("like-file", "change", () => take($("like-file").files));
listen("like-remove", "click", () => { setLike(null); $("text").focus(); });
listen("why-form", "submit", (event) => { event.preventDefault(); explain(); });
listen("why-model", "change", () => { fillClasses(); explain(); });
listen("why-opacity", "input", draw);
listen("why-close", "click", () => $("why").close());
listen("why", "close", () => { lastWhy = null; });
listen("key-cancel", "click", () => $("key").close());
listen("key-forget", "click", () => { sessionStorage.removeItem(KEY); location.reload(); });

addEventListener("hashchange", showView);
addEventListener("paste", ({ clipboardData }) => take(clipboardData.files));
for (const name of ["dragover", "dragleave", "drop"]) {
  addEventListener(name, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    for (const zone of document.querySelectorAll("[data-drop]")) zone.classList.toggle("over", name === "dragover");
    if (name === "drop") take(event.dataTransfer.files);
  });
}

paint($("why-scale"), Array.from({ length: 128 }, (_, i) => i / 127));
showView();
start();
