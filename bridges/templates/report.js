// The recorded desk: choose a task, a node and a setting, see both models' answers. All text goes through
// textContent. Without this script the tables below the desk hold the same record.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent).desk || {};
  const tasks = Object.keys(data).filter((task) => Array.isArray(data[task].nodes) && data[task].nodes.length);
  if (!tasks.length) return;
  const byId = (id) => document.getElementById(id);
  const [task, node, setting] = ["desk-task", "desk-node", "desk-setting"].map(byId);
  const hidden = /[\p{C}\p{Zl}\p{Zp}\u00a0\u034f\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f\u2000-\u200a\u202f\u205f\u2800\u3000\u3164\uffa0\ufe00-\ufe0f]/gu;
  const visible = (text) =>
    String(text).replace(hidden, (c) => `[U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}]`);
  const element = (name, text, parent, attributes = {}) => {
    const made = document.createElement(name);
    if (text !== null) made.textContent = visible(text);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    parent.append(made);
    return made;
  };
  const fill = (select, names) => {
    select.replaceChildren();
    names.forEach((name, i) => element("option", name, select, { value: i }));
  };
  const logit = (value) => (value > 0 ? "+" : "") + Number(value).toPrecision(3);
  const cells = (row, desk, model, prompt, i, j) => {
    const before = desk.unedited[model][prompt], after = desk[model][i][j][prompt];
    const token = (index) => desk.tokens[index];
    element("td", `${logit(before)}, says "${token(desk.unedited[`${model}_top`][prompt])}"`, row);
    const text = `${logit(after)}, says "${token(desk[`${model}_top`][i][j][prompt])}"`;
    element("td", before > 0 && after < 0 ? `${text}: flipped` : text, row, before > 0 && after < 0 ? { class: "bad" } : {});
  };
  const show = () => {
    const desk = data[tasks[task.value]], i = Number(node.value), j = Number(setting.value);
    const answer = byId("desk-answer");
    answer.replaceChildren();
    const region = element("div", null, answer, { class: "scroll", tabindex: "0", role: "region", "aria-label": "Answers of both models" });
    const table = element("table", null, region);
    element("caption", `${tasks[task.value]}: ${desk.nodes[i]} goes to ${desk.settings[j].target}, strength ${desk.settings[j].strength}. Answer minus distractor in logits, and the most likely next token.`, table);
    const head = element("tr", null, element("thead", null, table));
    for (const name of ["prompt ends with", "answer / distractor", "student", "student, changed", "dense model", "dense model, edited"])
      element("th", name, head, { scope: "col" });
    const body = element("tbody", null, table);
    desk.prompts.forEach((prompt, n) => {
      const row = element("tr", null, body);
      element("th", prompt.text.slice(-40), row, { scope: "row" });
      element("td", `"${prompt.answer}" / "${prompt.distractor}"`, row);
      for (const model of ["student", "dense"]) cells(row, desk, model, n, i, j);
    });
    for (const mark of document.querySelectorAll(".picked")) mark.classList.remove("picked");
    for (const mark of document.querySelectorAll(".nd"))
      if (mark.textContent === desk.nodes[i] && mark.closest("[data-task]")?.dataset.task === tasks[task.value]) mark.classList.add("picked");
  };
  const choose = () => {
    const desk = data[tasks[task.value]];
    fill(node, desk.nodes);
    fill(setting, desk.settings.map((one) => `${one.target}, strength ${one.strength}`));
    setting.value = Math.min(1, desk.settings.length - 1);
    show();
  };
  fill(task, tasks);
  task.addEventListener("change", choose);
  for (const select of [node, setting]) select.addEventListener("change", show);
  document.addEventListener("click", (event) => {
    const circle = event.target.closest?.(".nd");
    const owner = circle?.closest("[data-task]")?.dataset.task;
    const index = tasks.indexOf(owner);
    if (index < 0 || data[owner].nodes.indexOf(circle.textContent) < 0) return;
    task.value = index;
    choose();
    node.value = data[owner].nodes.indexOf(circle.textContent);
    show();
    byId("desk").scrollIntoView();
  });
  byId("desk-live").hidden = false;
  choose();
})();
