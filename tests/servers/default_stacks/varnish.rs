//! Varnish with its default configuration in front of one server.

use std::{
    fs,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
};

use crate::support::programs::{block_until, directory::Directory};

pub const BINARY: &str = "/usr/sbin/varnishd";

/// A running Varnish. Dropping it stops the process and deletes its directory.
pub struct Varnish {
    child: Child,
    port: u16,
    _dir: Directory,
}

impl Varnish {
    /// Starts a cache in front of this server. Returns `None` if Varnish is not installed.
    pub fn start(backend: SocketAddr) -> Option<Self> {
        if !Path::new(BINARY).exists() {
            return None;
        }
        let dir = Directory::create("varnish").unwrap();
        // Another process may bind the port between this probe and Varnish. Then the next one is tried.
        let start = |_| {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let log = fs::File::create(dir.0.join("log")).unwrap();
            let mut child = Command::new(BINARY)
                // In the foreground, without privileges to give up, and with the cache in memory.
                .args(["-F", "-j", "none", "-s", "malloc,16m", "-n"])
                .arg(dir.0.join("work"))
                .args(["-a", &format!("127.0.0.1:{port}"), "-b", &backend.to_string()])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(log)
                .spawn()
                .unwrap();
            let mut is_up = false;
            block_until(|| {
                is_up = responds(port);
                is_up || child.try_wait().unwrap().is_some()
            });
            is_up.then_some((child, port))
        };
        let (child, port) = (0..5).find_map(start).unwrap_or_else(|| {
            panic!("Varnish did not start: {:?}", fs::read_to_string(dir.0.join("log")))
        });
        Some(Self { child, port, _dir: dir })
    }

    pub fn port(&self) -> u16 {
        self.port
    }
}

/// The manager process accepts connections before its worker can respond.
fn responds(port: u16) -> bool {
    let respond = || -> io::Result<usize> {
        let mut tcp = TcpStream::connect(("127.0.0.1", port))?;
        tcp.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        tcp.read(&mut [0; 16])
    };
    respond().is_ok_and(|read| read > 0)
}

/// Stops the manager process, which stops its worker. A killed manager leaves its worker behind.
impl Drop for Varnish {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let _ = self.child.wait();
    }
}
