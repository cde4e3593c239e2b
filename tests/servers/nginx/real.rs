//! nginx as the upstream of these tests.

use std::cell::Cell;

use super::Upstream;
use crate::support::programs::nginx;

pub struct Nginx {
    nginx: nginx::Nginx,
    reloads: Cell<usize>,
}

/// Status 444 closes the connection after the request was read. The timeout of the header applies to connections
/// that were opened in advance and never used. A reload does not close them earlier.
const SERVER: &str = "
    keepalive_timeout 1s;
    client_header_timeout 1s;
    location / { return 200 hello; }
    location /cut { return 444; }
";

impl Nginx {
    /// Returns `None` if nginx is not installed.
    pub fn start() -> Option<Self> {
        let nginx = nginx::Nginx::start("", SERVER)?;
        Some(Self { nginx, reloads: Cell::new(0) })
    }
}

impl Upstream for Nginx {
    fn port(&self) -> u16 {
        self.nginx.port()
    }

    fn reload(&self) {
        self.nginx.signal("reload");
        self.reloads.set(self.reloads.get() + 1);
    }

    fn is_reloaded(&self) -> bool {
        let exited = self.nginx.log("error.log").matches("exited with code 0").count();
        exited >= self.reloads.get()
    }

    fn log(self: Box<Self>) -> String {
        self.nginx.quit()
    }
}
