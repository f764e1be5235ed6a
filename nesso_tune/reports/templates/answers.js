// Shows the answers of one language, and those that got worse.
"use strict";
(() => {
  const language = document.getElementById("language"), worse = document.getElementById("worse");
  if (!language) return;
  const update = () => {
    for (const article of document.querySelectorAll("article")) {
      const other = language.value && article.dataset.language !== language.value;
      article.hidden = other || (worse.checked && article.dataset.worse !== "yes");
    }
  };
  language.addEventListener("change", update);
  worse.addEventListener("change", update);
})();
