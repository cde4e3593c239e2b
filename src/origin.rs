use std::{
    fmt,
    hash::{Hash, Hasher},
};

use http::{
    Uri,
    uri::{Authority, Scheme},
};

/// The origin of a URI: its scheme, host and port, compared as in RFC 6454.
///
/// The scheme's default port is equal to no port, the case of hosts is ignored, and the userinfo is ignored.
///
/// It shares the memory of the URI, so it keeps the complete URI alive.
#[derive(Clone)]
pub struct Origin {
    scheme: Option<Scheme>,
    authority: Option<Authority>,
}

impl Origin {
    /// Returns the origin of a URI.
    #[must_use]
    pub fn of(uri: &Uri) -> Self {
        Self { scheme: uri.scheme().cloned(), authority: uri.authority().cloned() }
    }

    /// Returns a copy that has no userinfo and shares no memory with the URI.
    pub(crate) fn detached(&self) -> Self {
        let scheme = self.scheme.as_ref().and_then(|scheme| scheme.as_str().parse().ok());
        let host = self.host();
        let authority = match self.port() {
            Some(port) => format!("{host}:{port}").parse().ok(),
            None => host.parse().ok(),
        };
        let detached = Self { scheme, authority };
        // The parts of a URI parse again. If one did not, the copy would be another origin.
        if detached == *self { detached } else { self.clone() }
    }

    fn host(&self) -> &str {
        self.authority.as_ref().map_or("", |authority| authority.host())
    }

    /// Returns the port, unless it is the default port of the scheme.
    fn port(&self) -> Option<u16> {
        let own = match self.scheme.as_ref().map(Scheme::as_str) {
            Some("http") => Some(80),
            Some("https") => Some(443),
            _ => None,
        };
        let port = self.authority.as_ref()?.port_u16();
        port.filter(|port| own != Some(*port))
    }
}

impl PartialEq for Origin {
    fn eq(&self, other: &Self) -> bool {
        self.scheme == other.scheme
            && self.port() == other.port()
            && self.host().eq_ignore_ascii_case(other.host())
    }
}

impl Eq for Origin {}

impl Hash for Origin {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.scheme.hash(state);
        self.port().hash(state);
        for byte in self.host().bytes() {
            state.write_u8(byte.to_ascii_lowercase());
        }
        state.write_u8(0xff);
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(scheme) = &self.scheme {
            write!(f, "{scheme}://")?;
        }
        f.write_str(self.host())?;
        match self.port() {
            Some(port) => write!(f, ":{port}"),
            None => Ok(()),
        }
    }
}

/// Shows the origin as its `Display` does, without userinfo.
impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Origin({self})")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn of(uri: &str) -> Origin {
        Origin::of(&uri.parse().unwrap())
    }

    #[test]
    fn equal_scheme_host_and_port_are_one_origin() {
        let same = ["http://a", "HTTP://A/x?y", "http://a:80/", "http://me:secret@a:80/"];
        let all: HashSet<_> = same.map(of).into();
        assert_eq!(all.len(), 1);
        let others = ["http://a:81", "https://a", "http://a:443", "http://ab", "/", "http://[::1]"];
        let all: HashSet<_> = others.into_iter().chain(["http://a"]).map(of).collect();
        assert_eq!(all.len(), 7);
    }

    #[test]
    fn detached_origin_is_equal_and_has_no_userinfo() {
        let uris = [
            "http://a",
            "HTTP://me:secret@A:80/x?y",
            "ftp://a:81",
            "https://me@[::1]:443/path",
            "/",
            "*",
            "a:443",
            "http://a:",
            "http://a:99999",
            "http://a:0",
            "http://\u{61}%41.b",
        ];
        for uri in uris {
            let Ok(uri) = uri.parse() else { continue };
            let origin = Origin::of(&uri);
            let detached = origin.detached();
            assert_eq!((&detached, detached.to_string()), (&origin, origin.to_string()));
            let authority = detached.authority.as_ref().map_or("", |authority| authority.as_str());
            assert!(!authority.contains('@'), "{authority}");
        }
    }

    #[test]
    fn display_and_debug_show_the_origin_only() {
        let origin = of("https://me:secret@[::1]:443/path");
        assert_eq!(origin.to_string(), "https://[::1]");
        assert_eq!(format!("{origin:?}"), "Origin(https://[::1])");
        assert_eq!(
            (of("http://a:81").to_string(), of("/").to_string()),
            ("http://a:81".into(), String::new())
        );
    }
}
