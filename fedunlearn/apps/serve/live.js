"use strict"
// The server sends a part of the page as HTML whenever it has changed; this puts it in its place.

const page = document.querySelector("[data-events]")
const connection = document.getElementById("connection")
let source = null

function put(message) {
  const news = JSON.parse(message.data)
  const part = document.getElementById(news.part)
  if (!part || part.dataset.stamp === news.stamp) return
  const focused = part.contains(document.activeElement) ? document.activeElement.id : ""
  const open = [...part.querySelectorAll("details[open]")].map(details => details.id)
  part.innerHTML = news.html
  part.dataset.stamp = news.stamp
  for (const id of open) document.getElementById(id)?.setAttribute("open", "")
  if (focused) document.getElementById(focused)?.focus()
}

function listen() {
  source = new EventSource(page.dataset.events)
  source.onmessage = put
  source.onopen = () => { connection.textContent = "Live: the page changes by itself." }
  source.onerror = () => { connection.textContent = "The connection is lost. The page tries again, or reload it." }
}

document.addEventListener("visibilitychange", () => {
  source?.close()
  if (!document.hidden) listen()
})
if (!document.hidden) listen()
