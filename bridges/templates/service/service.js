// Keeps the pages alive: submits jobs, follows one, asks the desk. Everything goes over the HTTP API; all text from
// outside goes through textContent.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const hidden = /[\p{C}\p{Zl}\p{Zp}\u00a0\u034f\u115f\u1160\u2000-\u200a\u202f\u205f\u2800\u3000\u3164\uffa0\ufe00-\ufe0f]/gu;
  const visible = (text) =>
    String(text).replace(hidden, (c) => (c === "\n" ? "\\n" : `[U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}]`));
  const make = (name, parent, text = null, attributes = {}) => {
    const made = document.createElement(name);
    if (text !== null) made.textContent = visible(text);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    parent.append(made);
    return made;
  };
  const say = (text) => { byId("error").textContent = text; };
  const ask = async (method, path, body = undefined, headers = {}) => {
    say("");
    let answer;
    try {
      answer = await fetch(path, { method, headers: { "Content-Type": "application/json", ...headers }, body: body === undefined ? (method === "GET" ? undefined : "{}") : JSON.stringify(body) });
    } catch {
      throw new Error("The server does not answer. Is `sparsebridge serve` still running?");
    }
    const value = answer.status === 204 ? {} : await answer.json();
    if (!answer.ok) throw Object.assign(new Error(value.error || `The server answered ${answer.status}.`), { status: answer.status });
    return value;
  };
  const busy = async (button, work) => {
    button.disabled = true;
    try { await work(); } catch (error) { say(error.message); } finally { button.disabled = false; }
  };

  // --- new job -------------------------------------------------------------------------------------------------
  const startSubmit = (form) => {
    const configs = JSON.parse(form.dataset.configs), settings = JSON.parse(form.dataset.settings);
    const choose = () => {
      const recipe = form.recipe.value;
      form.config.replaceChildren();
      for (const name of configs[recipe]) make("option", form.config, name || "(its own)", { value: name });
      if (configs[recipe].includes("python")) form.config.value = "python";
      byId("settings").replaceChildren();
      for (const key of settings[recipe]) {
        const label = make("label", byId("settings"), key);
        make("input", label, null, { name: `set ${key}`, placeholder: "as in the config" });
      }
    };
    form.recipe.addEventListener("change", choose);
    choose();
    // One key as long as the same is asked: a request that is sent again after a lost answer makes no second job.
    const newKey = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
    let key = newKey();
    form.addEventListener("input", () => { key = newKey(); });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      busy(event.submitter, async () => {
        const wanted = {};
        for (const input of byId("settings").querySelectorAll("input")) {
          const text = input.value.trim();
          if (text) wanted[input.name.slice(4)] = plain(text);
        }
        const body = { recipe: form.recipe.value, config: form.config.value, run: form.run.value, settings: wanted };
        const job = await ask("POST", "/api/v1/jobs", body, { "Idempotency-Key": key });
        key = newKey();
        location.assign(`/jobs/${job.id}`);
      });
    });
  };
  const plain = (text) => {
    if (text.includes(",")) return text.split(",").map((part) => part.trim()).filter(Boolean);
    try { return JSON.parse(text); } catch { return /^[a-z_0-9]+$/.test(text) ? [text] : text; }
  };

  // --- one job -------------------------------------------------------------------------------------------------
  const POINTS = 440; // of a curve: two to a pixel
  const CURVES = ["total", "ce", "kl", "nmse", "density"];
  const followJob = (root) => {
    const rows = [], log = byId("log");
    const source = new EventSource(`/api/v1/jobs/${root.dataset.id}/events`);
    const lost = "The server does not answer: what stands here may be old. Trying again.";
    let isDrawing = false;
    const redraw = () => {
      isDrawing = false;
      byId("no-curves").hidden = true;
      byId("curves").replaceChildren();
      for (const name of CURVES) if (Number.isFinite(rows.at(-1)[name])) draw(name, rows);
    };
    source.addEventListener("job", (event) => showJob(JSON.parse(event.data)));
    source.addEventListener("metrics", (event) => {
      for (const row of JSON.parse(event.data)) if (!rows.length || row.step > rows.at(-1).step) rows.push(row);
      if (!isDrawing) requestAnimationFrame(redraw); // many events come at once for a long run
      isDrawing = true;
    });
    source.addEventListener("log", (event) => {
      const isAtEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
      log.append(JSON.parse(event.data).replace(/[^\P{C}\n\t]/gu, ""));
      if (isAtEnd) log.scrollTop = log.scrollHeight;
    });
    source.addEventListener("end", () => source.close());
    source.onopen = () => { if (byId("error").textContent === lost) say(""); };
    source.onerror = () => say(source.readyState === EventSource.CLOSED ? "The job's events ended; load the page again." : lost);
    byId("cancel").addEventListener("click", (event) =>
      busy(event.target, async () => showJob(await ask("POST", `/api/v1/jobs/${root.dataset.id}/cancel`))));
  };
  const showJob = (job) => {
    byId("state").textContent = job.is_cancelling ? "stopping: training writes a checkpoint first" : job.state;
    byId("reason").textContent = visible(job.reason);
    byId("waits").textContent = job.waits;
    byId("attempt").textContent = job.attempt;
    byId("cancel").hidden = job.engine !== "" || !["queued", "running"].includes(job.state);
    if (!job.progress) return;
    const { what, done, total, left, values } = job.progress;
    byId("bar").value = job.state === "done" ? 1 : done / total;
    const shown = Object.entries(values).map(([key, value]) => `${key} ${value}`).join(", ");
    byId("progress").textContent = visible(`${what} ${done} of ${total}${left ? `, ${left} left` : ""}${shown ? `; ${shown}` : ""}`);
  };
  const draw = (name, rows) => {
    const [width, height, pad] = [220, 90, 4];
    const own = rows.filter((row) => Number.isFinite(row[name])), values = own.map((row) => row[name]);
    const low = values.reduce((one, other) => Math.min(one, other)), high = values.reduce((one, other) => Math.max(one, other));
    const last = rows.at(-1).step, every = Math.ceil(own.length / POINTS);
    const x = (step) => pad + ((width - 2 * pad) * step) / (last || 1);
    const y = (value) => height - pad - ((height - 2 * pad) * (value - low)) / (high - low || 1);
    const shown = own.filter((_, i) => i % every === 0 || i === own.length - 1);
    const points = shown.map((row) => `${x(row.step).toFixed(1)} ${y(row[name]).toFixed(1)}`);
    const figure = make("figure", byId("curves"));
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    for (const [key, value] of Object.entries({ width, height, role: "img", "aria-label": `${name} by step: now ${values.at(-1).toPrecision(3)}, from ${low.toPrecision(3)} to ${high.toPrecision(3)}` })) svg.setAttribute(key, value);
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", `M${points.join("L")}`);
    svg.append(path);
    figure.append(svg);
    make("figcaption", figure, `${name} ${values.at(-1).toPrecision(3)} at step ${last} (${low.toPrecision(3)} to ${high.toPrecision(3)})`);
  };

  // --- the desk ------------------------------------------------------------------------------------------------
  const startDesk = (button) => {
    const form = byId("desk"), keep = byId("keep");
    let session = null;
    let asked = 0, changes = 0; // questions, and changes of the controls: an answer may come late
    const open = async () => {
      byId("desk-loading").textContent = "loading both models, some seconds";
      try {
        session = await ask("POST", `/api/v1/runs/${button.dataset.run}/sessions`);
      } finally { byId("desk-loading").textContent = ""; }
    };
    const load = async () => {
      await open();
      form.task.replaceChildren();
      for (const task of session.tasks) make("option", form.task, `${task.task} (${task.verdict.undefined || task.verdict})`, { value: task.task });
      const edited = session.tasks.find((task) => task.edit);
      if (edited) form.task.value = edited.task;
      form.hidden = keep.hidden = false;
      chooseTask();
    };
    const askModels = async (what, body) => {
      try {
        return await ask("POST", `/api/v1/sessions/${session.id}/${what}`, body);
      } catch (error) {
        if (error.status !== 404) throw error;
        await open(); // they were unloaded meanwhile; the controls stay
        return ask("POST", `/api/v1/sessions/${session.id}/${what}`, body);
      }
    };
    const markStale = () => {
      changes += 1;
      if (byId("desk-answer").hasChildNodes()) byId("desk-stale").textContent = "The controls have changed since this answer. Save and export keep the controls.";
    };
    const chooseTask = () => {
      const task = session.tasks.find((own) => own.task === form.task.value);
      form.prompt.value = task.example.clean || "";
      form.counterfactual.value = task.example.corrupted || "";
      for (const area of [form.prompt, form.counterfactual]) area.scrollTop = area.scrollHeight; // what is asked stands last
      const nodes = byId("desk-nodes"), chosen = task.edit ? task.edit.nodes : task.nodes.slice(0, 4);
      nodes.replaceChildren();
      for (const node of [...new Set([...chosen, ...task.nodes])]) {
        const label = make("label", nodes);
        make("input", label, null, { type: "checkbox", value: node }).checked = chosen.includes(node);
        label.append(` ${visible(node)}`);
      }
      byId("desk-more").textContent = task.nodes.length < task.of_nodes ? `${task.nodes.length} of ${task.of_nodes} nodes, those that matter most first; the command sparsebridge desk takes any.` : "";
      const strength = task.edit ? task.edit.strength : 1; // the least at which the edit does most
      form.strength.step = Number.isInteger(4 * strength) ? 0.25 : "any";
      form.strength.max = Math.max(4, 2 * strength);
      form.strength.value = strength;
      byId("strength-value").textContent = strength;
      markStale();
    };
    const setting = () => ({
      task: form.task.value,
      kind: form.kind.value,
      positions: form.positions.value,
      nodes: [...byId("desk-nodes").querySelectorAll("input:checked")].map((input) => input.value),
      strength: Number(form.strength.value),
      prompt: form.prompt.value,
      counterfactual: form.kind.value === "patch" ? form.counterfactual.value : null,
    });
    button.addEventListener("click", () => busy(button, load));
    form.task.addEventListener("change", chooseTask);
    const answer = async () => {
      const body = { ...setting(), continuation: Number(form.continuation.value), off_target: form.off_target.checked };
      const own = (asked += 1), before = changes;
      try {
        const found = await askModels("intervene", body);
        if (own !== asked) return; // a later question's answer is the one to show
        showAnswer(found);
        byId("desk-answer").dataset.strength = body.strength;
        if (before === changes) byId("desk-stale").textContent = "";
      } catch (error) { if (own === asked) throw error; }
    };
    form.addEventListener("input", markStale);
    form.strength.addEventListener("input", () => { byId("strength-value").textContent = form.strength.value; });
    form.strength.addEventListener("change", () => busy(form.querySelector("button"), answer));
    form.addEventListener("submit", (event) => { event.preventDefault(); busy(event.submitter, answer); });
    keep.addEventListener("submit", (event) => {
      event.preventDefault();
      busy(event.submitter, async () => {
        byId("kept").textContent = event.submitter.value === "adapters" ? "fitting the adapter, this takes a while" : "";
        try {
          const isForced = event.submitter.value === "adapters" && keep.elements.force.checked;
          await askModels(event.submitter.value, { name: keep.elements.name.value, setting: setting(), force: isForced });
          byId("kept").textContent = `kept: ${event.submitter.value}/${keep.elements.name.value} in the run folder`;
        } catch (error) { byId("kept").textContent = ""; throw error; }
      });
    });
  };
  const share = (value) => (Number.isFinite(value) ? `${(100 * value).toFixed(1)} %` : "");
  const best = (tokens) => tokens.reduce((one, other) => (other.probability > one.probability ? other : one));
  const showAnswer = (found) => {
    const root = byId("desk-answer");
    root.replaceChildren();
    const both = make("div", root, null, { class: "both" });
    for (const model of ["student", "dense"]) {
      const own = found[model], part = make("section", both);
      make("h3", part, model === "dense" ? "Dense model" : "Student");
      if (own.undefined) {
        make("p", part, `Not asked: ${own.undefined}`, { class: "bad", "data-model": model });
        continue;
      }
      make("p", part, own.changed ? `The most likely next token changed: "${best(own.before).text}" to "${best(own.after).text}".` : "The most likely next token is the same.", { class: own.changed ? "bad" : "note", "data-model": model });
      make("p", part, `KL from the unchanged answer: ${own.kl.toPrecision(3)} nats`);
      if (Number.isFinite(own.difference?.before))
        make("p", part, `The task's answer minus its distractor: ${own.difference.before.toFixed(2)} before, ${own.difference.after.toFixed(2)} after (logits)`);
      const table = make("table", part), head = make("tr", make("thead", table));
      for (const name of ["next token", "before", "after"]) make("th", head, name, { scope: "col" });
      const body = make("tbody", table);
      own.before.forEach((token, i) => {
        const row = make("tr", body);
        make("th", row, `"${token.text}"`, { scope: "row", class: "token" });
        make("td", row, share(token.probability));
        make("td", row, share(own.after[i].probability));
      });
      if (own.continuation) {
        make("p", part, "Goes on with, before and after:");
        make("pre", part).textContent = own.continuation.before;
        make("pre", part).textContent = own.continuation.after;
      }
    }
    if (found.off_target) make("p", root, offTarget(found.off_target), { id: "off-target" });
  };
  const offTarget = ({ undefined: why, kl, form, share_of_tokens: touched }) => {
    if (why || kl.undefined) return `Effect on other text: not measured (${why || kl.undefined})`;
    const interval = Number.isFinite(kl.low) ? ` (95 % interval ${kl.low.toPrecision(3)} to ${kl.high.toPrecision(3)})` : "";
    return `Effect on other text, as ${form}: KL ${kl.value.toPrecision(3)} nats/token${interval}, at ${share(touched)} of the tokens`;
  };

  if (byId("submit")) startSubmit(byId("submit"));
  if (byId("job")) followJob(byId("job"));
  if (byId("open-desk")) startDesk(byId("open-desk"));
})();
