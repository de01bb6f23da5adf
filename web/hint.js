// The host's general hint that a node failed, which says to check its inputs: where a sentence of ours says what is
// wrong, the hint is closed by its own button. The error stays in the host's list of errors and at the node's frame.

const HINT = '[data-testid="error-overlay"]';
const CLOSE = '[data-testid="error-overlay-dismiss"]';
const LOOKS_MILLISECONDS = 50;
const LOOKS = 20; // it is on the page a moment after the error has come

// A hint on more than this node stays: its heading is a count.
export function closeHint(title, looks = LOOKS) {
  const hint = document.querySelector?.(HINT);
  if (hint?.textContent.includes(title)) hint.querySelector(CLOSE)?.click();
  else if (!hint && looks) setTimeout(() => closeHint(title, looks - 1), LOOKS_MILLISECONDS);
}
