for (const place of document.querySelectorAll(".copied")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    const text = place.querySelector("pre").textContent;
    try { await navigator.clipboard.writeText(text); } catch {
      getSelection().selectAllChildren(place.querySelector("pre"));
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  place.append(button);
}
