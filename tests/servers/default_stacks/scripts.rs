//! Servers that are scripts beside this file. Each one prints its port, and ends when its standard input is closed.

use std::{
    io::{BufRead, BufReader},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// A running script. Dropping it ends the process.
pub struct Script {
    child: Child,
    port: u16,
}

impl Script {
    /// An HTTP/1.1 server on Node.js that closes an idle connection after one second. Returns `None` if Node.js is
    /// not installed.
    pub fn node() -> Option<Self> {
        Self::start(Path::new("node"), "keep_alive.js")
    }

    /// A gRPC server on grpcio whose connections end after one second. Returns `None` if grpcio is not installed
    /// in the virtual environment.
    pub fn grpcio() -> Option<Self> {
        let python = root().join("target/peers-venv/bin/python");
        Self::start(&python, "max_connection_age.py")
    }

    fn start(program: &Path, script: &str) -> Option<Self> {
        let mut child = Command::new(program)
            .arg(root().join("tests/servers/default_stacks").join(script))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take()?).read_line(&mut line).unwrap();
        let port =
            line.trim().parse().unwrap_or_else(|_| panic!("{script} did not start: {line:?}"));
        Some(Self { child, port })
    }

    pub fn addr(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

impl Drop for Script {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
