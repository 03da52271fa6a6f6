// Rating by hand. The server is rlcm_fast/rating/server.py; this page keeps only the picks that are not yet sent.
"use strict";

const $ = (id) => document.getElementById(id);
const RETRY_MS = 1500;
const blobs = new Map(); // file -> promise of an object URL: images are loaded once, and before they are shown
let state = null; // what the server said last
let tiers = []; // places on the page, best first, ties together
let tying = false; // the next pick ties with the last one
let paused = false;
let sending = ""; // what is on its way: the id of a question, or the name of an action
let shown = ""; // the id of the question on the page

// ---- the server

async function post(name, content) {
  const answer = await fetch(name, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content),
  });
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(body.error || `the run answered ${answer.status}`);
}

async function follow() {
  let version = "";
  for (;;) {
    try {
      const answer = await fetch(`state?after=${version}`);
      if (!answer.ok) throw new Error(String(answer.status));
      accept(await answer.json());
      version = state.version;
      render();
      if (state.end) { await pause(RETRY_MS); version = ""; }
    } catch {
      if (!state || !state.end) lost();
      version = "";
      await pause(RETRY_MS);
    }
  }
}

function pause(ms) { return new Promise((done) => setTimeout(done, ms)); }

function accept(next) {
  // Two requests hear of changes; the older answer may come last. After a restart the numbers begin anew.
  if (!state || next.session !== state.session || next.version >= state.version) state = next;
}

async function act(name, content) {
  const what = content.id || name;
  if (sending === what) return; // the same key twice; another question may be answered already
  sending = what;
  try {
    await post(name, content);
    say("");
    // Show what comes next at once, without waiting for the other request to hear of it.
    accept(await (await fetch("state")).json());
  } catch (error) {
    say(error instanceof TypeError ? "The run cannot be reached. Nothing was recorded; it is tried again when you answer." : sentence(error.message));
  }
  if (sending === what) sending = "";
  render();
}

function sentence(text) { return text.charAt(0).toUpperCase() + text.slice(1) + "."; }

function say(text) { $("alert").textContent = text; $("alert").hidden = !text; }

// ---- images

function image(file) {
  if (!blobs.has(file)) {
    const loaded = fetch(`images/${file}`).then((answer) => {
      if (!answer.ok) throw new Error(String(answer.status));
      return answer.blob();
    }).then((blob) => URL.createObjectURL(blob));
    loaded.catch(() => blobs.delete(file));
    blobs.set(file, loaded);
  }
  return blobs.get(file);
}

function keepOnly(files) {
  for (const [file, loaded] of blobs) {
    if (files.has(file)) continue;
    loaded.then((url) => URL.revokeObjectURL(url)).catch(() => {});
    blobs.delete(file);
  }
}

// ---- what is shown

function render() {
  renderProgress();
  renderLearned();
  const question = state.question;
  const rates = question !== null && !state.end && !paused;
  $("rating").hidden = !rates;
  $("waiting").hidden = rates;
  $("stop").disabled = $("pause").disabled = Boolean(state.end);
  if (!rates) { renderWaiting(); if (!question) shown = ""; return; }
  if (question.id !== shown) ask(question);
  renderPicks();
}

function ask(question) {
  // A new question: no picks, fresh buttons, the images of the next ones in the background.
  shown = question.id;
  tiers = [];
  tying = false;
  const isComparison = question.kind === "comparison";
  $("task").textContent = isComparison
    ? `Pick the better one: a blind comparison with the start model, ${question.number} of ${question.count}`
    : `Prompt ${question.number} of ${question.count} in this round: best first`;
  $("prompt").textContent = question.prompt || "(no prompt)";
  $("skip-comparisons").hidden = !isComparison;
  $("send").hidden = isComparison; // a click on the better image is the answer
  const columns = Math.min(question.images.length, question.images.length > 4 ? Math.ceil(question.images.length / 2) : 4);
  $("images").style.setProperty("--columns", columns);
  $("images").style.setProperty("--tallest", question.images.length > columns ? "33vh" : "64vh");
  $("images").classList.toggle("small", question.width < 160);
  $("images").replaceChildren(...question.images.map((file, place) => figure(question, file, place)));
  const upcoming = [question.images, ...state.next].flat();
  keepOnly(new Set(upcoming));
  Promise.allSettled(question.images.map(image)).then(() => state.next.flat().forEach(image));
  if (document.activeElement === document.body || document.activeElement.closest("#images, .actions")) picks()[0].focus();
}

function figure(question, file, place) {
  const holder = document.createElement("figure");
  const pick = document.createElement("button");
  pick.type = "button";
  pick.className = "pick";
  pick.dataset.place = place;
  const picture = document.createElement("img");
  picture.alt = "";
  picture.width = question.width;
  picture.height = question.height;
  image(file).then((url) => { picture.src = url; }).catch(() => say("An image could not be loaded; reload the page."));
  const key = document.createElement("span");
  key.className = "key";
  key.textContent = place + 1;
  key.setAttribute("aria-hidden", "true");
  const badge = document.createElement("span");
  badge.className = "badge";
  badge.hidden = true;
  pick.append(picture, badge, key);
  pick.addEventListener("click", () => choose(place));
  const zoom = document.createElement("button");
  zoom.type = "button";
  zoom.className = "zoom";
  zoom.textContent = "\u2922";
  zoom.setAttribute("aria-label", `See image ${place + 1} large`);
  zoom.tabIndex = -1;
  zoom.addEventListener("click", () => enlarge(place));
  holder.append(pick, zoom);
  return holder;
}

function picks() { return [...document.querySelectorAll(".pick")]; }

function rankOf(place) {
  let better = 0;
  for (const tier of tiers) {
    if (tier.includes(place)) return { rank: better + 1, isTied: tier.length > 1 };
    better += tier.length;
  }
  return null;
}

function renderPicks() {
  const count = picks().length;
  for (const pick of picks()) {
    const place = Number(pick.dataset.place), found = rankOf(place), badge = pick.querySelector(".badge");
    pick.classList.toggle("picked", found !== null);
    pick.classList.toggle("best", found !== null && found.rank === 1);
    pick.setAttribute("aria-pressed", String(found !== null));
    const words = found === null ? "not picked" : `${found.isTied ? "tied for " : ""}place ${found.rank}`;
    pick.setAttribute("aria-label", `Image ${place + 1} of ${count}, ${words}`);
    badge.hidden = found === null;
    badge.textContent = found === null ? "" : `${found.isTied ? "=" : ""}${found.rank}`;
  }
  const any = tiers.length > 0;
  $("send").disabled = !any || sending === shown;
  $("tie").setAttribute("aria-pressed", String(tying));
  $("tie").firstChild.textContent = any ? "Tie " : "All tie ";
  $("tie").title = any ? "The next pick ties with the last one" : "None is better than another";
  $("tie").hidden = tiers.flat().length >= count;
  $("undo").disabled = !any && !state.can_undo;
  $("undo").title = any ? "Take back the last pick" : "Take back the last answer";
}

function renderProgress() {
  const done = state.round === null ? 0 : state.round - 1;
  const round = state.round === null ? "" : `Round ${state.round} of ${state.num_rounds}`;
  const ready = state.rounds_ready > 1 ? `, ${state.rounds_ready - 1} more ready` : "";
  $("progress-text").textContent = round + ready || "Rating by hand";
  $("progress").value = state.num_rounds ? done / state.num_rounds : 0;
  $("progress").textContent = round;
  const pace = state.median_seconds === null ? "" : `, ${state.median_seconds} s for each prompt`;
  $("totals").textContent = state.rated.prompts ? `You have rated ${state.rated.prompts} prompts with ${state.rated.images} images${pace}. Every answer is saved.` : "";
}

function renderWaiting() {
  let title = "The next images are being drawn", text = "";
  if (state.end === "finished") {
    title = "The run has finished. Thank you!";
    text = "The tuned model is in the folder of the run. You may close this page.";
  } else if (state.end) {
    title = "The run has stopped";
    text = "All your answers are saved. Start it again with the same command; this page then goes on by itself.";
  } else if (paused) {
    title = "A break";
    text = "Everything is saved. Press p, or the button above, to go on.";
  } else if (state.rated.prompts === 0 && state.round === null) {
    title = "The model is loading, and draws the first images";
    text = "They appear here by themselves.";
  } else if (state.rated.prompts > 0) {
    title = "The model learns from your answers";
    text = state.wait_seconds ? `New images come in about ${Math.ceil(state.wait_seconds)} seconds.` : "New images appear here by themselves.";
  }
  $("waiting-title").textContent = title;
  $("waiting-text").textContent = text;
  $("waiting-undo").hidden = !state.can_undo || Boolean(state.end) || paused;
  $("pause").firstChild.textContent = paused ? "Go on " : "Pause ";
}

function lost() {
  shown = "";
  $("rating").hidden = true;
  $("waiting").hidden = false;
  $("waiting-undo").hidden = true;
  $("waiting-title").textContent = "The run cannot be reached";
  $("waiting-text").textContent = "It may be starting, or it has ended. Your answers are saved. Start it again with the same command; this page goes on by itself.";
}

function renderLearned() {
  const rates = state.win_rates;
  $("learned").hidden = rates.length === 0;
  if (rates.length === 0) return;
  const last = rates[rates.length - 1];
  const percent = Math.round(100 * last.rate);
  $("learned-text").textContent = `After round ${last.round} you preferred the tuned model in ${percent} % of ${last.wins + last.ties + last.losses} pairs (${last.wins} won, ${last.ties} tied, ${last.losses} lost; a tie is half a win). 50 % is no change.`;
  const most = Math.max(state.num_rounds, last.round);
  const x = (round) => 30 + (round / most) * 280, y = (rate) => 86 - rate * 76;
  const points = [{ round: 0, rate: 0.5 }, ...rates];
  const parts = [line(30, y(0.5), 310, y(0.5), "half"), text(2, y(1) + 4, "100 %"), text(2, y(0.5) + 3, "50 %"), text(2, y(0) + 2, "0 %")];
  parts.push(shape("polyline", { points: points.map((point) => `${x(point.round)},${y(point.rate)}`).join(" "), class: "curve" }));
  for (const point of rates) parts.push(shape("circle", { cx: x(point.round), cy: y(point.rate), r: 3.5, class: "dot" }));
  $("chart").replaceChildren(...parts);
  $("chart").setAttribute("aria-label", `Win rate against the start model by round: ${rates.map((point) => `${point.round}: ${Math.round(100 * point.rate)} %`).join(", ")}`);
}

function shape(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
function line(x1, y1, x2, y2, kind) { return shape("line", { x1, y1, x2, y2, class: kind }); }
function text(x, y, words) { const made = shape("text", { x, y }); made.textContent = words; return made; }

// ---- what the person does

function choose(place) {
  const question = state.question;
  if (!question || sending === question.id) return;
  if (question.kind === "comparison") { tiers = [[place]]; send(); return; }
  const index = tiers.findIndex((tier) => tier.includes(place));
  if (index >= 0) {
    tiers[index] = tiers[index].filter((other) => other !== place);
    tiers = tiers.filter((tier) => tier.length);
  } else if (tying && tiers.length) tiers[tiers.length - 1].push(place);
  else tiers.push([place]);
  tying = false;
  renderPicks();
}

function tie() {
  if (!state.question) return;
  if (tiers.length === 0) { tiers = [picks().map((pick) => Number(pick.dataset.place))]; if (state.question.kind === "comparison") { send(); return; } }
  else tying = !tying;
  renderPicks();
}

async function send() { if (tiers.length && state.question) { await act("answer", { id: shown, tiers }); } }
async function skip() { if (state.question) await act("skip", { id: shown }); }

async function undo() {
  if (tiers.length && state.question) {
    tiers[tiers.length - 1].pop();
    tiers = tiers.filter((tier) => tier.length);
    renderPicks();
  } else if (state.can_undo) await act("undo", {});
}

function togglePause() {
  paused = !paused;
  render();
  $("pause").firstChild.textContent = paused ? "Go on " : "Pause ";
}

function enlarge(place) {
  const found = picks()[place];
  if (!found) return;
  $("zoom-image").src = found.querySelector("img").src;
  $("zoom-image").style.imageRendering = state.question.width < 160 ? "pixelated" : "auto";
  $("zoom-image").alt = `Image ${place + 1}: ${state.question.prompt}`;
  $("zoom-dialog").showModal();
}

function move(by) {
  const all = picks(), at = all.indexOf(document.activeElement);
  const next = at < 0 ? 0 : Math.min(all.length - 1, Math.max(0, at + by));
  all[next].focus();
}

function columns() { return getComputedStyle($("images")).gridTemplateColumns.split(" ").length; }

document.addEventListener("keydown", (event) => {
  if (!state || event.ctrlKey || event.metaKey || event.altKey) return;
  if (document.querySelector("dialog[open]")) { if (event.key === "z" && $("zoom-dialog").open) $("zoom-dialog").close(); return; }
  const focused = picks().indexOf(document.activeElement);
  const rates = !$("rating").hidden;
  const isButton = document.activeElement instanceof HTMLButtonElement && focused < 0;
  const keys = {
    ArrowLeft: () => move(-1), ArrowRight: () => move(1), ArrowUp: () => move(-columns()), ArrowDown: () => move(columns()),
    t: tie, s: skip, z: () => enlarge(Math.max(0, focused)),
  };
  if (event.key === "?") { $("help-dialog").showModal(); event.preventDefault(); }
  else if (event.key === "p") togglePause();
  else if (event.key === "u") { if (!paused) undo(); }
  else if (!rates) return;
  else if (/^[1-9]$/.test(event.key)) { const place = Number(event.key) - 1; if (place < picks().length) { picks()[place].focus(); choose(place); } }
  else if (event.key === "Enter" && !isButton) {
    // A picked order is sent; with nothing picked, Enter picks the image that has the focus, as Space does.
    if (tiers.length) { event.preventDefault(); send(); }
  } else if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});

$("send").addEventListener("click", send);
$("tie").addEventListener("click", tie);
$("skip").addEventListener("click", skip);
$("undo").addEventListener("click", undo);
$("waiting-undo").addEventListener("click", () => act("undo", {}));
$("skip-comparisons").addEventListener("click", () => act("skip_comparisons", {}));
$("pause").addEventListener("click", togglePause);
$("help").addEventListener("click", () => $("help-dialog").showModal());
$("stop").addEventListener("click", () => $("stop-dialog").showModal());
$("stop-not").addEventListener("click", () => $("stop-dialog").close());
$("stop-now").addEventListener("click", () => { $("stop-dialog").close(); act("stop", {}); });
follow();
