//! A real nginx with a configuration of its own, in a directory of its own.

use std::{
    cell::Cell,
    env, fs,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
};

use super::{PATIENCE, Upstream, held_up_until};

pub const BINARY: &str = "/usr/sbin/nginx";

pub struct Nginx {
    child: Child,
    port: u16,
    reloads: Cell<usize>,
    dir: Dir,
}

/// Gone when dropped.
struct Dir(PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// 444 closes the connection on a request that was taken in. The header's timeout is that of connections
/// that were opened ahead and never used: not even a reload closes these before.
fn configuration(dir: &Path, port: u16) -> String {
    let dir = dir.display();
    format!(
        "daemon off;
worker_processes 1;
pid {dir}/pid;
error_log {dir}/error.log notice;
events {{ worker_connections 512; }}
http {{
    log_format witness '$request_method $http_x_id $status $pid $connection $connection_requests';
    access_log {dir}/access.log witness;
    client_body_temp_path {dir}/body;
    proxy_temp_path {dir}/proxy;
    fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi;
    scgi_temp_path {dir}/scgi;
    keepalive_timeout 1s;
    client_header_timeout 1s;
    server {{
        listen 127.0.0.1:{port};
        location / {{ return 200 hello; }}
        location /cut {{ return 444; }}
    }}
}}
"
    )
}

impl Nginx {
    /// None: it is not installed.
    pub fn start() -> Option<Self> {
        if !Path::new(BINARY).exists() {
            return None;
        }
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let (process, n) = (process::id(), STARTED.fetch_add(1, Ordering::Relaxed));
        let dir = Dir(env::temp_dir().join(format!("buttress-nginx-{process}-{n}")));
        fs::create_dir_all(&dir.0).unwrap();
        // Another process may take the port in between: then there is another one.
        let start = |_| {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            fs::write(dir.0.join("conf"), configuration(&dir.0, port)).unwrap();
            let mut child = command(&dir.0).spawn().unwrap();
            let mut up = false;
            held_up_until(|| {
                up = TcpStream::connect(("127.0.0.1", port)).is_ok();
                up || child.try_wait().unwrap().is_some()
            });
            up.then_some((child, port))
        };
        let (child, port) = (0..5).find_map(start).unwrap_or_else(|| {
            panic!("nginx did not start: {:?}", fs::read_to_string(dir.0.join("error.log")))
        });
        Some(Self { child, port, reloads: Cell::new(0), dir })
    }
}

fn command(dir: &Path) -> Command {
    let mut command = Command::new(BINARY);
    // Its messages go to the error log as well.
    command.arg("-p").arg(dir).arg("-c").arg(dir.join("conf")).stderr(Stdio::null());
    command
}

impl Upstream for Nginx {
    fn port(&self) -> u16 {
        self.port
    }

    fn reload(&self) {
        let status = command(&self.dir.0).args(["-s", "reload"]).status().unwrap();
        assert!(status.success(), "{status}");
        self.reloads.set(self.reloads.get() + 1);
    }

    fn is_reloaded(&self) -> bool {
        let log = fs::read_to_string(self.dir.0.join("error.log")).unwrap();
        log.matches("exited with code 0").count() >= self.reloads.get()
    }

    fn log(mut self: Box<Self>) -> String {
        let status = command(&self.dir.0).args(["-s", "quit"]).status().unwrap();
        assert!(status.success(), "{status}");
        held_up_until(|| self.child.try_wait().unwrap().is_some());
        fs::read_to_string(self.dir.0.join("access.log")).unwrap()
    }
}

/// A master that is killed leaves its workers behind: it is asked to stop, and killed if it does not.
impl Drop for Nginx {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|over| over.is_some()) {
            return;
        }
        let _ = command(&self.dir.0).args(["-s", "stop"]).status();
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while self.child.try_wait().is_ok_and(|over| over.is_none()) {
            if tokio::time::Instant::now() > deadline {
                let _ = self.child.kill();
            }
            std::thread::yield_now();
        }
    }
}
