// What the server renders stays as it is without this script; it keeps an open page up to date, and adds local time.
"use strict";

const RETRY = 3000;
const PATIENCE = 2500;
const trouble = document.getElementById("trouble");
const at = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

function localTimes(root) {
  for (const one of root.querySelectorAll("time:not([data-local])")) {
    const utc = one.textContent;
    one.dataset.local = "";
    one.replaceChildren(at.format(new Date(one.dateTime)), Object.assign(document.createElement("small"), { textContent: ` ${utc}` }));
  }
}

function say(text, there) {
  trouble.replaceChildren(text);
  if (there) {
    trouble.append(" ", Object.assign(document.createElement("a"), { href: there, textContent: "Sign in again" }));
  }
  trouble.hidden = !text;
}

// A form that somebody is filling in is left alone.
function inUse(region) {
  const active = document.activeElement;
  const fields = [...region.querySelectorAll("input:not([type=hidden]), select")];
  return fields.some((one) => one === active || (one.type !== "checkbox" && one.value !== one.defaultValue && one.tagName === "INPUT")) ||
    region.querySelector("details[open]") !== null;
}

async function refresh() {
  const response = await fetch(location.href, { redirect: "manual", headers: { Accept: "text/html" } }).catch(() => null);
  if (!response || !response.ok) {
    return;
  }
  const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
  for (const region of document.querySelectorAll("[data-region]")) {
    const now = fresh.getElementById(region.id);
    if (now && !inUse(region)) {
      localTimes(now);
      if (now.innerHTML !== region.innerHTML) {
        const focus = region.contains(document.activeElement) ? document.activeElement.id : null;
        region.replaceChildren(...now.childNodes);
        if (focus !== null) {
          const there = (focus && document.getElementById(focus)) || region.querySelector("button, a") || document.getElementById("main");
          there.focus({ preventScroll: true });
        }
      }
    }
  }
}

function follow(there, again) {
  const source = new EventSource(there);
  let patience = null;
  source.onopen = () => {
    clearTimeout(patience);
    patience = null;
    if (!trouble.hidden) {
      say("");
    }
    if (again) {
      refresh();
    }
    again = true;
  };
  source.addEventListener("fragment", (event) => {
    const { id, html } = JSON.parse(event.data);
    const place = document.getElementById(id);
    if (place && place.dataset.html !== html) {
      const focus = place.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
      place.dataset.html = html;
      place.innerHTML = html;
      localTimes(place);
      if (focus) {
        place.querySelector(`a[href="${CSS.escape(focus)}"]`)?.focus({ preventScroll: true });
      }
    }
  });
  source.addEventListener("changed", refresh);
  source.addEventListener("problem", (event) => say(`${event.data}: what you see may be old. It is tried again.`));
  source.addEventListener("fine", () => say(""));
  source.onerror = () => {
    // A stream ends now and then, and is opened again at once.
    patience ??= setTimeout(() => say("The server does not answer: what you see may be old. It is tried again."), PATIENCE);
    if (source.readyState === EventSource.CLOSED) {
      source.close();
      setTimeout(() => probe(there), RETRY);
    }
  };
  addEventListener("pagehide", () => source.close(), { once: true });
}

// A stream that was refused is not opened again by the browser: is it the session, or the server?
async function probe(there) {
  const response = await fetch("/live/session", { redirect: "manual" }).catch(() => null);
  if (response && response.type === "opaqueredirect") {
    say("Your session has ended, or the server was restarted.", `/sign-in?next=${encodeURIComponent(location.pathname + location.search)}`);
  } else {
    follow(there, true);
  }
}

localTimes(document);
if (document.body.dataset.live) {
  follow(document.body.dataset.live, false);
}
