//! nginx with a configuration of the test, in a temporary directory.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
};

use super::{MAX_WAIT, block_until, directory::Directory};

pub const BINARY: &str = "/usr/sbin/nginx";

/// A running nginx. Dropping it stops the process and deletes its directory.
pub struct Nginx {
    child: Child,
    port: u16,
    dir: Directory,
}

/// The access log has one line for each request: method, `x-id` header, status, process, connection and number of
/// the request on its connection. A server can use the cache named `cache`.
fn configuration(dir: &Path, port: u16, listen: &str, server: &str) -> String {
    let dir = dir.display();
    format!(
        "daemon off;
worker_processes 1;
pid {dir}/pid;
error_log {dir}/error.log notice;
events {{ worker_connections 4096; }}
http {{
    log_format requests '$request_method $http_x_id $status $pid $connection $connection_requests';
    access_log {dir}/access.log requests;
    client_body_temp_path {dir}/body;
    proxy_temp_path {dir}/proxy;
    proxy_cache_path {dir}/cache keys_zone=cache:1m;
    fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi;
    scgi_temp_path {dir}/scgi;
    server {{
        listen 127.0.0.1:{port} {listen};
        {server}
    }}
}}
"
    )
}

impl Nginx {
    /// Starts a server with these parameters of `listen` and these directives. Returns `None` if nginx is not
    /// installed.
    pub fn start(listen: &str, server: &str) -> Option<Self> {
        if !Path::new(BINARY).exists() {
            return None;
        }
        let dir = Directory::create("nginx").unwrap();
        // Another process may bind the port before nginx does. The test then tries another port.
        let start = |_| {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            fs::write(dir.0.join("conf"), configuration(&dir.0, port, listen, server)).unwrap();
            let mut child = command(&dir.0).spawn().unwrap();
            let mut is_up = false;
            block_until(|| {
                is_up = TcpStream::connect(("127.0.0.1", port)).is_ok();
                is_up || child.try_wait().unwrap().is_some()
            });
            is_up.then_some((child, port))
        };
        let (child, port) = (0..5).find_map(start).unwrap_or_else(|| {
            panic!("nginx did not start: {:?}", fs::read_to_string(dir.0.join("error.log")))
        });
        Some(Self { child, port, dir })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Runs `nginx -s reload`, for example.
    pub fn signal(&self, name: &str) {
        let status = command(&self.dir.0).args(["-s", name]).status().unwrap();
        assert!(status.success(), "{status}");
    }

    /// The text of `access.log` or `error.log`.
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.dir.0.join(name)).unwrap()
    }

    /// Lets open requests finish, stops the process and returns its access log.
    pub fn quit(mut self) -> String {
        self.signal("quit");
        block_until(|| self.child.try_wait().unwrap().is_some());
        self.log("access.log")
    }
}

fn command(dir: &Path) -> Command {
    let mut command = Command::new(BINARY);
    // nginx writes the same messages to the error log.
    command.arg("-p").arg(dir).arg("-c").arg(dir.join("conf")).stderr(Stdio::null());
    command
}

/// Stops the master process, and kills it only if it does not stop, because a killed master leaves its workers behind.
impl Drop for Nginx {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|over| over.is_some()) {
            return;
        }
        let _ = command(&self.dir.0).args(["-s", "stop"]).status();
        let deadline = tokio::time::Instant::now() + MAX_WAIT;
        while self.child.try_wait().is_ok_and(|over| over.is_none()) {
            if tokio::time::Instant::now() > deadline {
                let _ = self.child.kill();
            }
            std::thread::yield_now();
        }
    }
}
