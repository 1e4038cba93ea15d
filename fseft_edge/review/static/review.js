// The page: list of cases, description of the current case, corrections, decisions. All text is set with textContent,
// never as HTML. Nothing is kept in the storage of the browser: strokes that are not saved are in this page only.

import { canDraw, colourOf, Viewer, WINDOWS } from "/viewer.js";

const element = (id) => document.getElementById(id);
const GROUPS = ["Failed", "Flagged", "Not flagged", "Not done"];
const FAILURES = ["failed", "set_aside"];
const DRAWS = canDraw();

let cases = [];
let current = null; // key of the selected case
let seen = null; // key of the case whose mask is displayed
let seenMask = null; // sha256 of this mask file
let loading = new AbortController();
let viewer = null;
let cross = true;
const notes = new Map(); // notes that were written but not yet stored, by key

const caseOf = (key) => cases.find((item) => item.key === key);
const hasMask = (item) => item?.state === "done";
const reviewOf = (item) => item.decisions.at(-1);

function make(tag, text, className) {
  const made = document.createElement(tag);
  made.textContent = text ?? "";
  if (className) made.className = className;
  return made;
}

async function ask(path, options) {
  const response = await fetch(path, { cache: "no-store", redirect: "error", ...options });
  if (response.ok) return response;
  const type = response.headers.get("Content-Type") ?? "";
  const reply = type.startsWith("application/json") ? await response.json() : { error: (await response.text()).trim() };
  const error = new Error(reply.error || `The server replied with status ${response.status}.`);
  throw Object.assign(error, { status: response.status, maskChanged: reply.mask_changed });
}

async function download(path, signal, onProgress) {
  const response = await ask(path, { signal });
  const bytes = new Uint8Array(Number(response.headers.get("Content-Length")));
  const reader = response.body.getReader();
  let at = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    bytes.set(value, at);
    at += value.length;
    onProgress(at / bytes.length);
  }
  if (at !== bytes.length) throw new Error("The scan was not received completely.");
  return bytes.buffer;
}

// The sha256 of the mask comes with the mask, so a decision names the mask that was displayed.
const sha256Of = (response) => response.headers.get("ETag").replaceAll('"', "");

// List of cases

async function refresh() {
  const listed = await (await ask("/cases")).json();
  cases = listed.cases;
  element("progress").textContent = `${listed.decided} of ${listed.masks} decided`;
  element("reviewer").textContent = `Reviewer: ${listed.reviewer}`;
  element("note").maxLength = listed.longest_note;
  showList();
}

const groupOf = (item) => {
  if (FAILURES.includes(item.state)) return 0;
  if (!hasMask(item)) return 3;
  return item.organs.some(({ flags }) => flags.length) ? 1 : 2;
};

function showList() {
  const list = element("cases");
  const rows = [];
  let group = -1;
  for (const item of cases) {
    if (groupOf(item) !== group) {
      group = groupOf(item);
      rows.push(make("li", GROUPS[group], "group"));
    }
    const button = make("button", item.key, reviewOf(item)?.decision);
    button.type = "button";
    button.setAttribute("aria-current", String(item.key === current));
    button.append(make("small", reviewOf(item)?.decision ?? (hasMask(item) ? "undecided" : item.state.replace("_", " "))));
    button.addEventListener("click", () => open(item.key));
    const row = make("li");
    row.append(button);
    rows.push(row);
  }
  list.replaceChildren(...rows);
  list.querySelector('[aria-current="true"]')?.scrollIntoView({ block: "nearest" });
}

// Display of a case

function showMessage(text) {
  element("message").textContent = text;
  element("message").hidden = !text;
}

function showDescription(item) {
  element("title").textContent = item.key;
  element("name").textContent = item.name ?? "";
  element("name").hidden = !item.name;
  showDecided(item);
  const warnings = item.corrected && hasMask(item)
    ? ["This is the corrected mask. Volumes and flags are those of the mask of the batch.", ...item.warnings]
    : [...item.warnings];
  if (viewer && hasMask(item) && item.no_drawing) warnings.push(item.no_drawing);
  element("warnings").replaceChildren(...warnings.map((warning) => make("li", warning)));
  element("decision").hidden = !hasMask(item);
  element("note").value = notes.get(item.key) ?? reviewOf(item)?.note ?? "";
  element("history").replaceChildren(...historyOf(item).map(historyRow));
  element("organs").replaceChildren(...item.organs.map(organRow));
  showPens(item);
}

function showDecided(item) {
  const review = reviewOf(item);
  const another = review?.mask_sha256 && seen === item.key && review.mask_sha256 !== seenMask;
  const decided = review && (another ? `${review.decision}, but for another mask. Decide again.` : review.decision);
  element("decided").textContent = decided ?? (hasMask(item) ? "undecided" : "");
}

// Corrections and decisions, the latest first.
function historyOf({ corrections, decisions }) {
  const entries = [
    ...corrections.map((one) => ({ ...one, what: one.origin === "file" ? "corrected by a file" : "corrected" })),
    ...decisions.map((one) => ({ ...one, what: one.decision })),
  ];
  return entries.sort((a, b) => (a.at < b.at ? -1 : 1)).reverse();
}

function historyRow({ what, at, reviewer, note }) {
  const when = `${at.slice(0, 16).replace("T", " ")} UTC`;
  return make("li", `${what} ${when}${reviewer && ` by ${reviewer}`}${note ? `: ${note}` : ""}`);
}

function organRow(organ, at) {
  const row = make("li");
  const shown = make("input");
  shown.type = "checkbox";
  shown.checked = true;
  shown.disabled = !viewer;
  shown.title = `Show or hide ${organ.name}`;
  shown.addEventListener("change", () => viewer.setShown(organ.label, shown.checked));
  const swatch = make("span", "", "swatch");
  swatch.style.backgroundColor = `rgb(${colourOf(organ.label).join()})`;
  const name = make("button", organ.name);
  name.type = "button";
  name.title = `Move the cross to ${organ.name}, and draw this organ`;
  name.disabled = !viewer;
  name.addEventListener("click", () => {
    viewer.goTo(organ.label);
    choosePen(at);
  });
  name.append(make("span", ` ${organ.volume_ml.toFixed(1)} ml`, "volume"));
  row.append(shown, swatch, name);
  if (organ.flags.length) row.append(make("span", organ.flags.join(", ").replaceAll("_", " "), "flags"));
  return row;
}

function allowDecision() {
  for (const id of ["accept", "reject"]) element(id).disabled = seen !== current || !hasMask(caseOf(current));
  showDrawing();
}

async function open(key) {
  if (keepsStrokes("select another case")) return;
  await show(key);
}

async function show(key) {
  loading.abort();
  loading = new AbortController();
  const { signal } = loading;
  const item = caseOf(key);
  current = key;
  seen = null;
  seenMask = null;
  viewer?.clear();
  setTool("look");
  element("redraw").hidden = true;
  element("picture").hidden = true;
  element("position").textContent = "";
  showDescription(item);
  showList();
  allowDecision();
  if (!hasMask(item)) {
    const state = item.superseded_by
      ? `This case is superseded by ${item.superseded_by}, so its mask is not used.`
      : `The state of this case is "${item.state.replace("_", " ")}". There is no mask.`;
    showMessage([item.reason || state, item.remedy].join("\n"));
    return;
  }
  try {
    const shown = await (viewer ? showScan(item, signal) : showPicture(item, signal));
    if (signal.aborted) return;
    [seen, seenMask] = [key, shown];
    showDecided(item);
  } catch (error) {
    if (signal.aborted) return;
    showMessage(`${key} cannot be displayed. ${error.message}`);
  }
  allowDecision();
}

// Display scan and mask, or the picture; return the sha256 of the mask.
async function showScan(item, signal) {
  showMessage("Reading the scan …");
  const onProgress = (share) => showMessage(`Reading the scan … ${Math.round(100 * share)} %`);
  const [scan, mask] = await Promise.all([
    download(`/cases/${item.key}/scan.nii`, signal, onProgress),
    ask(`/cases/${item.key}/mask.nii.gz`, { signal }),
  ]);
  await viewer.show(scan, await mask.arrayBuffer(), item.organs, WINDOWS[element("window").value], element("fill").value / 100);
  showMessage("");
  return sha256Of(mask);
}

async function showPicture(item, signal) {
  const why = "This browser does not support WebGL2, so it cannot display the slices of the scan. Use another browser, or"
    + " turn on hardware acceleration.";
  showMessage(`${why}\nThe batch wrote no picture of this case.`);
  const picture = element("picture");
  const mask = await ask(`/cases/${item.key}/mask.nii.gz`, { signal });
  await mask.body.cancel();
  const response = await ask(`/cases/${item.key}/picture.png`, { signal });
  await response.blob();
  picture.src = `/cases/${item.key}/picture.png`;
  await picture.decode(); // a decision is possible only once the picture is displayed
  if (signal.aborted) return;
  picture.hidden = false;
  showMessage(`${why}\nThe picture below was written by the batch.`);
  return sha256Of(mask);
}

// Corrections

let tool = "look";
let saving = false;

// Whether there are strokes that are not saved; a message then says why the wanted action is not possible.
function keepsStrokes(action) {
  if (!viewer?.unsaved) return false;
  showMessage(`${current} has strokes that are not saved. Save or discard them before you ${action}.`);
  return true;
}

const canCorrect = () => viewer && seen === current && !caseOf(current).no_drawing;

function showPens({ organs, no_drawing: reason }) {
  element("correct").hidden = !viewer || !hasMask(caseOf(current)) || Boolean(reason);
  for (const row of document.querySelectorAll("#keys .drawing")) row.hidden = element("correct").hidden;
  const pen = element("pen");
  const chosen = Math.max(pen.selectedIndex, 0);
  pen.replaceChildren(...organs.map(({ name }) => make("option", name)));
  if (organs.length) choosePen(Math.min(chosen, organs.length - 1));
}

function choosePen(at) {
  const organ = caseOf(current).organs[at];
  if (!organ) return;
  element("pen").selectedIndex = at;
  element("pen-colour").style.backgroundColor = `rgb(${colourOf(organ.label).join()})`;
  for (const [row, one] of [...element("organs").children].entries()) one.setAttribute("aria-current", String(row === at));
  viewer?.setPen({ number: at + 1 });
}

function setTool(name) {
  if (name !== "look" && !canCorrect()) return;
  try {
    viewer?.setTool(name);
  } catch (error) {
    showMessage(`The mask of ${current} cannot be corrected here. ${error.message}`);
    return;
  }
  tool = name;
  for (const button of document.querySelectorAll("#tools button")) {
    button.setAttribute("aria-pressed", String(button.dataset.tool === name));
  }
  element("canvas").classList.toggle("draws", name !== "look");
  showBrush();
  // Invisible, not removed: the canvas must not change its size between two strokes.
  for (const option of element("options").children) option.classList.toggle("off", !option.dataset.for.includes(name));
}

function setRadius(radius) {
  const slider = element("radius");
  slider.value = radius;
  element("radius-mm").textContent = `${slider.value} mm`;
  viewer?.setPen({ radius: Number(slider.value) });
  showBrush();
}

let pointer = null; // place of the pointer on the canvas, in pixels

function showBrush() {
  const size = pointer ? viewer.brushAt(...pointer) : 0;
  const brush = element("brush");
  brush.hidden = size < 3;
  if (brush.hidden) return;
  [brush.style.left, brush.style.top] = pointer.map((at) => `${at}px`);
  brush.style.width = brush.style.height = `${size}px`;
}

function showDrawing() {
  const unsaved = Boolean(viewer?.unsaved);
  for (const button of document.querySelectorAll("#tools button")) button.disabled = !canCorrect();
  element("undo").disabled = !viewer?.canUndo;
  element("redo").disabled = !viewer?.canRedo;
  element("between").disabled = tool === "look" || !canCorrect();
  element("save").disabled = !unsaved || saving;
  element("discard").disabled = !unsaved || saving;
  element("unsaved").textContent = saving ? "Saving …" : unsaved ? "Strokes are not saved." : "";
}

const NO_SERVER = () =>
  `Your strokes are still in this page. If the review has ended, start it again with --port ${location.port}, open its`
  + " address in another tab, and save here once more.";

async function save() {
  if (!viewer?.unsaved || saving) return;
  const key = current;
  saving = true;
  showDrawing();
  try {
    const { stored, saved } = viewer.snapshot();
    const packed = new Blob([stored]).stream().pipeThrough(new CompressionStream("gzip"));
    const response = await ask(`/cases/${key}/correction`, {
      method: "POST",
      headers: { "Content-Type": "application/gzip", "If-Match": `"${seenMask}"` },
      body: await new Response(packed).blob(),
    });
    const { mask_sha256: sha256, problems } = await response.json();
    saved();
    seenMask = sha256;
    element("redraw").hidden = true;
    showMessage(problems.join("\n"));
  } catch (error) {
    const reached = error.status && error.status !== 403;
    showMessage(`The correction of ${key} was not saved. ${error.message}\n${reached ? "Your strokes are still in this page." : NO_SERVER()}`);
    element("redraw").hidden = !error.maskChanged;
    return;
  } finally {
    saving = false;
    showDrawing();
  }
  await refresh();
  showDescription(caseOf(key));
}

// After another person changed the mask: show the changed mask with the strokes of this page on it.
async function redraw() {
  const key = current;
  try {
    const mask = await ask(`/cases/${key}/mask.nii.gz`);
    await viewer.redrawOn(await mask.arrayBuffer());
    seenMask = sha256Of(mask);
    element("redraw").hidden = true;
    await refresh();
    showDescription(caseOf(key));
    showMessage("Your strokes are on the changed mask now. Check it, then save.");
  } catch (error) {
    showMessage(`The changed mask of ${key} cannot be displayed. ${error.message}`);
  }
}

async function discard() {
  if (!viewer?.unsaved || saving || !window.confirm("Discard the strokes that are not saved?")) return;
  const maskChanged = !element("redraw").hidden;
  viewer.discard();
  if (maskChanged) await show(current);
}

// Decisions

async function decide(decision) {
  const key = current;
  if (seen !== key || !hasMask(caseOf(key)) || keepsStrokes("decide")) return;
  const note = element("note").value;
  try {
    await ask(`/cases/${key}/decision`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ decision, note, mask_sha256: seenMask }),
    });
    notes.delete(key);
    await refresh();
    if (current === key) {
      showDescription(caseOf(key));
      showMessage("");
    }
  } catch (error) {
    showMessage(`The decision on ${key} was not stored. ${error.message}`);
  }
}

function step(by) {
  const at = cases.findIndex(({ key }) => key === current) + by;
  if (cases[at]) open(cases[at].key);
}

function toggleOrgans() {
  const boxes = [...document.querySelectorAll("#organs input")];
  const show = !boxes.some(({ checked }) => checked);
  for (const box of boxes) if (box.checked !== show) box.click();
}

function fillBetween() {
  if (tool !== "look") showMessage(viewer.interpolate());
}

const WITH_CONTROL = { z: () => viewer?.undo(), y: () => viewer?.redo(), Z: () => viewer?.redo(), s: () => save() };

const KEYS = {
  z: () => viewer?.undo(),
  y: () => viewer?.redo(),
  s: () => save(),
  v: () => setTool("look"),
  b: () => setTool("brush"),
  e: () => setTool("eraser"),
  f: () => setTool("outline"),
  c: () => setTool("cut"),
  g: () => setTool("grow"),
  i: () => fillBetween(),
  "[": () => setRadius(Number(element("radius").value) - 0.5),
  "]": () => setRadius(Number(element("radius").value) + 0.5),
  ...Object.fromEntries([...Array(9).keys()].map((at) => [at + 1, () => choosePen(at)])),
  a: () => decide("accepted"),
  r: () => decide("rejected"),
  n: () => step(1),
  p: () => step(-1),
  o: () => toggleOrgans(),
  x: () => viewer?.setCross((cross = !cross)),
  "+": () => viewer?.zoom(1.25),
  "-": () => viewer?.zoom(0.8),
  0: () => viewer?.zoom(0),
  ArrowUp: (shift) => viewer?.move(0, shift ? 1 : 0, shift ? 0 : 1),
  ArrowDown: (shift) => viewer?.move(0, shift ? -1 : 0, shift ? 0 : -1),
  ArrowLeft: (shift) => viewer?.move(shift ? 0 : 1, shift ? -1 : 0, 0),
  ArrowRight: (shift) => viewer?.move(shift ? 0 : -1, shift ? 1 : 0, 0),
};

const REPEATED = ["ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight", "[", "]"];

function onKey(event) {
  const control = event.ctrlKey || event.metaKey;
  if (event.altKey || event.repeat && !REPEATED.includes(event.key)) return;
  if (event.target.matches("textarea, select, input:not([type=checkbox])")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const action = control ? WITH_CONTROL[event.key] : KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  event.stopPropagation();
  action(event.shiftKey);
}

function showPosition({ slice, hu, organ }) {
  const [x, y, z] = slice.map((voxel) => Math.round(voxel) + 1);
  const where = `slice ${z} axial, ${y} coronal, ${x} sagittal · ${Math.round(hu)} HU`;
  element("position").textContent = organ ? `${where} · ${organ}` : where;
}

async function start() {
  if (DRAWS) {
    viewer = new Viewer(showPosition, () => {
      showMessage(""); // it is about something earlier
      showDrawing();
    });
    await viewer.attach(element("canvas"));
  }
  for (const id of ["planes", "window", "fill"]) element(id).disabled = !viewer;
  element("planes").addEventListener("change", ({ target }) => viewer.setPlanes(target.value));
  element("window").addEventListener("change", ({ target }) => viewer.setWindow(WINDOWS[target.value]));
  element("fill").addEventListener("input", ({ target }) => viewer.setFill(target.value / 100));
  for (const button of document.querySelectorAll("#tools button")) {
    button.addEventListener("click", () => setTool(button.dataset.tool));
  }
  element("pen").addEventListener("change", ({ target }) => choosePen(target.selectedIndex));
  element("radius").addEventListener("input", ({ target }) => setRadius(target.value));
  for (const id of ["tolerance", "reach"]) {
    element(id).addEventListener("change", ({ target }) => viewer.setPen({ [id]: target.valueAsNumber || 1 }));
  }
  for (const input of document.querySelectorAll("#bar select, #bar input, #correct select, #correct input")) {
    input.addEventListener("change", () => input.blur()); // so that keys are shortcuts again
  }
  for (const [id, action] of Object.entries({
    undo: () => viewer.undo(), redo: () => viewer.redo(), between: fillBetween, save, discard, redraw,
  })) element(id).addEventListener("click", action);
  for (const kind of ["pointermove", "pointerleave", "wheel"]) {
    element("canvas").addEventListener(kind, ({ offsetX, offsetY }) => {
      pointer = kind === "pointerleave" ? null : [offsetX, offsetY];
      if (viewer) showBrush();
    });
  }
  window.addEventListener("beforeunload", (event) => {
    if (viewer?.unsaved) event.preventDefault();
  });
  setRadius(element("radius").value);
  setTool("look");
  element("accept").addEventListener("click", () => decide("accepted"));
  element("reject").addEventListener("click", () => decide("rejected"));
  element("note").addEventListener("input", ({ target }) => notes.set(current, target.value));
  document.addEventListener("keydown", onKey, { capture: true });
  await refresh();
  window.addEventListener("focus", () => refresh().catch((error) => showMessage(error.message)));
  if (cases.length) await open(cases[0].key);
  else showMessage("There are no cases in this batch yet.");
}

start().catch((error) => showMessage(error.message));
