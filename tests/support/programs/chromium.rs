//! Chromium without a window, driven over the Chrome DevTools Protocol.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout},
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async_with_config,
    tungstenite::{Message, protocol::WebSocketConfig},
};

use super::{MAX_WAIT, directory::Directory};

const BINARY: &str = "/usr/bin/chromium";

/// The path of axe-core, which `.ci/run` unpacks. `None` if it is missing.
pub fn axe_core() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/axe/axe.min.js");
    path.exists().then_some(path)
}

/// A running Chromium with one page. Dropping it stops all of its processes and deletes its profile.
pub struct Chromium {
    child: Child,
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    session: Value,
    sent: u64,
    /// The events of the page so far: `Log.entryAdded`, `Runtime.exceptionThrown`, `Network.requestWillBeSent`, ….
    events: Vec<Value>,
    _profile: Directory,
}

impl Chromium {
    /// Starts a browser with an empty page of this width. Returns `None` if Chromium is not installed.
    pub async fn start(width: u32) -> Option<Self> {
        if !Path::new(BINARY).exists() {
            return None;
        }
        let profile = Directory::create("chromium").unwrap();
        let child = Command::new(BINARY)
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--hide-scrollbars",
                "--remote-debugging-port=0",
            ])
            .arg(format!("--user-data-dir={}", profile.0.display()))
            .arg("about:blank")
            // The child processes are in the process group of the browser, so that the drop stops them, too.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (port, path) = debugging_address(&profile.0).await;
        // Screenshots are larger than the default maximum of a frame.
        let config = WebSocketConfig::default().max_message_size(None).max_frame_size(None);
        let url = format!("ws://127.0.0.1:{port}{path}");
        let (socket, _) = connect_async_with_config(url, Some(config), false).await.unwrap();
        let (session, events) = (Value::Null, Vec::new());
        let mut browser = Self { child, socket, session, sent: 0, events, _profile: profile };
        let page = browser.call("Target.createTarget", json!({ "url": "about:blank" })).await;
        let target = json!({ "targetId": page["targetId"], "flatten": true });
        browser.session = browser.call("Target.attachToTarget", target).await["sessionId"].clone();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({})).await;
        }
        browser.set_width(width).await;
        Some(browser)
    }

    /// Calls a method of the protocol, and returns its result. Panics if the method fails.
    pub async fn call(&mut self, method: &str, params: Value) -> Value {
        self.sent += 1;
        let id = self.sent;
        let mut message = json!({ "id": id, "method": method, "params": params });
        if !self.session.is_null() {
            message["sessionId"] = self.session.clone();
        }
        self.socket.send(Message::text(message.to_string())).await.unwrap();
        let response = timeout(3 * MAX_WAIT, async {
            loop {
                let received = self.socket.next().await.expect("chromium has ended").unwrap();
                let Message::Text(text) = received else { continue };
                let message: Value = serde_json::from_str(&text).unwrap();
                if message["id"] == id {
                    return message;
                }
                self.events.push(message);
            }
        });
        let response = response.await.unwrap_or_else(|_| panic!("no response to {method}"));
        assert!(response["error"].is_null(), "{method}: {response}");
        response["result"].clone()
    }

    /// Evaluates an expression in the page. Waits for the result of a promise. Panics if it throws.
    pub async fn eval(&mut self, expression: &str) -> Value {
        let params =
            json!({ "expression": expression, "awaitPromise": true, "returnByValue": true });
        let result = self.call("Runtime.evaluate", params).await;
        assert!(result["exceptionDetails"].is_null(), "{expression}: {result}");
        result["result"]["value"].clone()
    }

    /// Waits until an expression is true. Returns the time that it took.
    pub async fn wait_until(&mut self, expression: &str, max_wait: Duration) -> Duration {
        let start = Instant::now();
        while self.eval(expression).await != true {
            if start.elapsed() > max_wait {
                let text = self.text().await;
                panic!("not true within {max_wait:?}: {expression}\n{text}");
            }
            sleep(Duration::from_millis(20)).await;
        }
        start.elapsed()
    }

    pub async fn open(&mut self, url: &str) {
        self.call("Page.navigate", json!({ "url": url })).await;
        self.wait_until("document.readyState === 'complete'", MAX_WAIT).await;
    }

    /// The visible text of the page.
    pub async fn text(&mut self) -> String {
        self.eval("document.body.innerText").await.as_str().unwrap_or_default().to_owned()
    }

    pub async fn set_width(&mut self, width: u32) {
        let size =
            json!({ "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", size).await;
    }

    /// Emulates a preference of the user, such as `prefers-color-scheme`.
    pub async fn prefer(&mut self, name: &str, value: &str) {
        let features = json!({ "features": [{ "name": name, "value": value }] });
        self.call("Emulation.setEmulatedMedia", features).await;
    }

    /// Presses and releases a key, such as `Tab` or `Enter`.
    pub async fn press(&mut self, key: &str) {
        let (code, text) = match key {
            "Tab" => (9, ""),
            "Enter" => (13, "\r"),
            "Escape" => (27, ""),
            " " => (32, " "),
            other => panic!("the code of the key {other:?} is missing"),
        };
        for kind in ["keyDown", "keyUp"] {
            let text = if kind == "keyDown" { text } else { "" };
            let event =
                json!({ "type": kind, "key": key, "windowsVirtualKeyCode": code, "text": text });
            self.call("Input.dispatchKeyEvent", event).await;
        }
    }

    /// Writes a text at the focus.
    pub async fn write(&mut self, text: &str) {
        self.call("Input.insertText", json!({ "text": text })).await;
    }

    /// Returns a screenshot of the top of the page as PNG, at most `max_height` pixels of it.
    pub async fn screenshot(&mut self, width: u32, max_height: u32) -> Vec<u8> {
        let height = self.eval("document.documentElement.scrollHeight").await.as_u64().unwrap();
        let height = height.min(max_height.into());
        let clip = json!({ "x": 0, "y": 0, "width": width, "height": height, "scale": 1 });
        let params = json!({ "format": "png", "captureBeyondViewport": true, "clip": clip });
        let image = self.call("Page.captureScreenshot", params).await;
        decode_base64(image["data"].as_str().unwrap())
    }

    /// Returns the events of this kind.
    pub fn events(&self, method: &str) -> Vec<&Value> {
        self.events.iter().filter(|event| event["method"] == method).collect()
    }

    /// Returns the errors and warnings of the console, and the exceptions that were not caught.
    pub fn errors(&self) -> Vec<String> {
        let is_error = |event: &&Value| {
            let params = &event["params"];
            match event["method"].as_str() {
                Some("Runtime.exceptionThrown") => true,
                Some("Log.entryAdded") => params["entry"]["level"] != "verbose",
                Some("Runtime.consoleAPICalled") => true,
                _ => false,
            }
        };
        self.events.iter().filter(is_error).map(|event| event["params"].to_string()).collect()
    }

    /// Returns the URLs that the page has requested.
    pub fn requested(&self) -> Vec<&str> {
        let requests = self.events("Network.requestWillBeSent").into_iter();
        requests.filter_map(|event| event["params"]["request"]["url"].as_str()).collect()
    }
}

/// Returns the port and the path of the protocol, which Chromium writes to its profile when it is ready.
async fn debugging_address(profile: &Path) -> (String, String) {
    let file = profile.join("DevToolsActivePort");
    let start = Instant::now();
    loop {
        let text = fs::read_to_string(&file).unwrap_or_default();
        if let Some((port, path)) = text.split_once('\n') {
            return (port.to_owned(), path.trim().to_owned());
        }
        assert!(start.elapsed() < 2 * MAX_WAIT, "chromium did not start");
        sleep(Duration::from_millis(20)).await;
    }
}

fn decode_base64(text: &str) -> Vec<u8> {
    let value = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let digits: Vec<u8> = text.bytes().filter(|c| *c != b'=').map(value).collect();
    let mut bytes = Vec::with_capacity(digits.len() * 3 / 4);
    for group in digits.chunks(4) {
        let bits = group.iter().fold(0u32, |bits, digit| bits << 6 | u32::from(*digit));
        let bits = bits << (6 * (4 - group.len()));
        bytes.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    bytes
}

impl Drop for Chromium {
    fn drop(&mut self) {
        // Chromium has processes for its page, its network and its GPU. They are in one group.
        let group = format!("-{}", self.child.id());
        let _ = Command::new("kill").args(["-KILL", "--", &group]).stderr(Stdio::null()).status();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
