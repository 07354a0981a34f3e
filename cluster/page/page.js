// A text in, its translation, alternatives and attention out.

import { AttentionView } from "./attention.js";

const TOKEN = "babelray-token";
const byId = (id) => document.getElementById(id);
const view = new AttentionView();

let info = { max_characters: Infinity };
let asked = null; // the request that is under way

function fail(message) {
  const box = byId("error");
  box.hidden = !message;
  box.textContent = message ?? "";
}

// The server's answer to one request; what goes wrong is told in words.
async function ask(path, options = {}, token = sessionStorage.getItem(TOKEN)) {
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  let answer = {};
  try {
    answer = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (response.ok) throw new Error("The answer was cut off.");
  }
  if (response.ok) return answer;
  if (response.status === 401) {
    const wasWrong = token !== null;
    sessionStorage.removeItem(TOKEN);
    byId("token-form").hidden = false;
    byId("token").focus();
    throw new Error(wasWrong ? "The token is wrong." : "Give the access token first.");
  }
  throw new Error(sentence(answer.error ?? `The server answered ${response.status}.`));
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (text.endsWith(".") ? "" : ".");

function languageName(code) {
  try {
    return new Intl.DisplayNames(["en"], { type: "language" }).of(code);
  } catch {
    return code;
  }
}

async function start(token) {
  info = await ask("info", {}, token);
  const [from, to] = [info.source_language, info.target_language].map(languageName);
  document.title = `${info.run} · Translate · babelray`;
  byId("run").textContent = info.run;
  byId("about").textContent = `${from} to ${to}, checkpoint ${info.checkpoint} (step ${info.step.toLocaleString("en")})`;
  byId("from").textContent = ` (${from})`;
  byId("text").lang = info.source_language;
  byId("translation").lang = info.target_language;
  const choice = byId("num-best");
  choice.replaceChildren(...Array.from({ length: info.max_num_best }, (_, n) => new Option(n + 1, n + 1)));
  choice.value = Math.min(4, info.max_num_best);
  count();
}

function count() {
  const length = [...byId("text").value].length;
  const most = info.max_characters;
  byId("count").textContent = Number.isFinite(most)
    ? `${length.toLocaleString("en")} of ${most.toLocaleString("en")} characters` : "";
  byId("count").style.color = length > most ? "var(--bad)" : "";
}

function request(text) {
  asked?.abort();
  asked = new AbortController();
  return ask("translate", {
    method: "POST",
    signal: asked.signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ text, num_best: Number(byId("num-best").value || 1), attention: true }),
  });
}

// Other lines can be chosen of an answer, not while it is about to be replaced.
function setBusy(isBusy) {
  if (isBusy) byId("result").setAttribute("aria-busy", "true");
  else byId("result").removeAttribute("aria-busy");
  byId("line").disabled = isBusy;
}

async function translate() {
  const text = byId("text").value;
  fail(null);
  byId("status").textContent = "";
  if (!text.trim()) {
    fail("Type a sentence first.");
    byId("text").focus();
    return;
  }
  byId("status").textContent = "Translating …";
  setBusy(true);
  try {
    show(await request(text));
  } catch (error) {
    if (error.name === "AbortError") return; // for a newer one
    byId("status").textContent = "";
    byId("result").hidden = true;
    fail(error.message);
  }
  setBusy(false);
}

function show(answer) {
  fail(null);
  byId("result").hidden = false;
  byId("translation").textContent = answer.translation || "(nothing)";
  const status = byId("status");
  const heard = Object.assign(document.createElement("span"), { className: "hearing", textContent: ` ${answer.translation}` });
  status.replaceChildren(`Translated in ${answer.seconds.toFixed(2)} s.`, heard);
  byId("notes").replaceChildren(...answer.notes.map((note) => {
    return Object.assign(document.createElement("li"), { textContent: sentence(note) });
  }));
  const lines = answer.lines.map((line, n) => ({ ...line, number: n + 1 }))
    .filter((line) => line.source_pieces.length);
  byId("line-choice").hidden = lines.length < 2;
  byId("line").replaceChildren(...lines.map((line, n) => new Option(`${line.number}: ${line.source.trim().slice(0, 60)}`, n)));
  byId("line").onchange = (event) => showLine(lines[event.target.value]);
  showAlternatives(lines[0]);
  view.show(answer.attention);
}

// Another line of the same text: its attention has to be asked for.
async function showLine(line) {
  showAlternatives(line);
  view.show(null);
  fail(null);
  try {
    view.show((await request(line.source)).attention);
  } catch (error) {
    if (error.name !== "AbortError") fail(error.message);
  }
}

function showAlternatives(line) {
  byId("alternatives").tBodies[0].replaceChildren(...(line?.alternatives ?? []).map((found, n) => {
    const row = document.createElement("tr");
    for (const [text, kind] of [[n + 1, "num"], [found.text || "(empty)", ""],
      [found.score.toFixed(3), "num"], [found.log_prob.toFixed(3), "num"]]) {
      row.append(Object.assign(document.createElement("td"), { textContent: text, className: kind }));
    }
    row.cells[1].lang = info.target_language;
    return row;
  }));
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  translate();
});
byId("text").addEventListener("input", count);
byId("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    translate();
  }
});
byId("token-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const token = byId("token").value.trim();
  byId("token").value = "";
  fail(null);
  try {
    if (!/^[!-~]+$/.test(token)) throw new Error("The token is wrong."); // no header can hold it
    await start(token);
    sessionStorage.setItem(TOKEN, token);
    byId("token-form").hidden = true;
    byId("text").focus();
  } catch (error) {
    fail(error.message);
  }
});

start().catch((error) => fail(error.message));
