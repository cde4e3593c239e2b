//! Prometheus and promtool: from `PATH`, or from where `.ci/observability` unpacks them.

use std::{
    env, fs,
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use super::{MAX_WAIT, block_until, directory::Directory};

/// Returns the path of `prometheus` or `promtool`. `None` if it is not installed.
pub fn program(name: &str) -> Option<PathBuf> {
    let unpacked = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/prometheus/usr/bin");
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).chain([unpacked]).map(|dir| dir.join(name)).find(|path| path.exists())
}

/// A running Prometheus that scrapes one target each second, with its exemplars. Dropping it stops the process and deletes
/// its data.
pub struct Prometheus {
    child: Child,
    pub url: String,
    dir: Directory,
}

impl Prometheus {
    /// Starts a server. Returns `None` if Prometheus is not installed.
    pub fn start(target: SocketAddr) -> Option<Self> {
        let program = program("prometheus")?;
        let dir = Directory::create("prometheus").unwrap();
        let config = format!(
            "global:\n  scrape_interval: 1s\nscrape_configs:\n- job_name: test\n  static_configs:\n  \
             - targets: ['{target}']\n"
        );
        fs::write(dir.0.join("prometheus.yml"), config).unwrap();
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let log = fs::File::create(dir.0.join("log")).unwrap();
        let mut child = Command::new(program)
            .arg(format!("--config.file={}", dir.0.join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", dir.0.join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .arg("--enable-feature=exemplar-storage")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        block_until(|| TcpStream::connect(address).is_ok() || child.try_wait().unwrap().is_some());
        let up = Self { child, url: format!("http://{address}"), dir };
        assert!(TcpStream::connect(address).is_ok(), "within {MAX_WAIT:?}: {}", up.log());
        Some(up)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.0.join("log")).unwrap_or_default()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
