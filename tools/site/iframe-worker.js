// The site's search runs in a worker, and browsers start none on pages from file://. This one stands in for it there:
// its script runs in a hidden frame, with a queue for messages that come before the script does.
"use strict";
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget { // by this name the search looks for it
    constructor(url) {
      super();
      const frame = document.createElement("iframe"), early = [];
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow, script = inside.document.createElement("script");
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.postMessage = (data) => early.push(data);
      script.onload = () => {
        this.postMessage = (data) => inside.dispatchEvent(new inside.MessageEvent("message", { data }));
        early.forEach(this.postMessage);
      };
      script.src = String(url);
      inside.document.body.append(script);
    }
  };
  window.Worker = window.IFrameWorker;
}
