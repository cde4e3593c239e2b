//! The checks of a request for the page. All parts of a request are untrusted input.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use http::{HeaderMap, HeaderValue, Response, StatusCode, header, request::Parts};

use crate::{
    endpoint::{EndpointBody, plain},
    user_code::catch_panic,
};

/// The hosts for which the page is always served.
const LOOPBACK_HOSTS: [&str; 3] = ["localhost", "127.0.0.1", "[::1]"];

/// Headers with which proxies state that they have forwarded a request, and their prefixes.
const FORWARDED: [&str; 12] = [
    "forwarded",
    "forwarded-for",
    "via",
    "cdn-loop",
    "x-forwarded",
    "x-real-ip",
    "x-client-ip",
    "x-cluster-client-ip",
    "true-client-ip",
    "fastly-client-ip",
    "fly-client-ip",
    "client-ip",
];
const FORWARDED_PREFIXES: [&str; 4] = ["x-forwarded-", "x-original-", "x-envoy-", "cf-connecting-"];

/// The maximum number of characters of the name that a guard of the controls returns.
const MAX_NAME: usize = 64;

/// The address of the peer of a request, for [`Dashboard::loopback`](super::Dashboard::loopback).
///
/// A server inserts it into the extensions of each request, for example by axum's `Extension(PeerAddr(peer))`. With the
/// feature `axum`, axum's `ConnectInfo<SocketAddr>` has the same effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerAddr(pub SocketAddr);

type Guard = Arc<dyn Fn(&Parts) -> bool + Send + Sync>;
type ControlGuard = Arc<dyn Fn(&Parts) -> Option<String> + Send + Sync>;

/// The rules for requests.
#[derive(Clone, Default)]
pub(super) struct Access {
    pub(super) is_loopback: bool,
    pub(super) guard: Option<Guard>,
    /// The hosts that are allowed besides [`LOOPBACK_HOSTS`].
    pub(super) hosts: Vec<String>,
    pub(super) controls: Option<ControlGuard>,
}

/// The response to a request that is not served.
type Declined = Box<Response<EndpointBody>>;

fn forbidden(reason: &'static str) -> Declined {
    Box::new(plain(StatusCode::FORBIDDEN, reason))
}

impl Access {
    /// Returns whether the application has chosen which requests are served.
    pub(super) const fn is_chosen(&self) -> bool {
        self.is_loopback || self.guard.is_some()
    }

    /// Checks the host, the peer and the guard.
    pub(super) fn check(&self, request: &Parts) -> Result<(), Declined> {
        if !self.is_host_allowed(request) {
            let reason = "this page is not served for this host; see `Dashboard::host`\n";
            return Err(Box::new(plain(StatusCode::MISDIRECTED_REQUEST, reason)));
        }
        if self.is_loopback {
            if is_forwarded(&request.headers) {
                return Err(forbidden("this page is not served through a proxy\n"));
            }
            match is_from_loopback(request) {
                Some(true) => {}
                Some(false) => return Err(forbidden("this page is served on this machine only\n")),
                None => {
                    let reason =
                        "the server does not state the address of the peer; see `PeerAddr`\n";
                    return Err(forbidden(reason));
                }
            }
        }
        if let Some(guard) = &self.guard {
            if catch_panic(|| guard(request)) != Some(true) {
                return Err(forbidden("the guard of this page has declined the request\n"));
            }
        }
        Ok(())
    }

    /// Checks a request for a control of the circuit, and returns the name of its sender.
    pub(super) fn check_control(&self, request: &Parts, circuit: &str) -> Result<String, Declined> {
        let Some(guard) = &self.controls else {
            return Err(forbidden("the page has no controls\n"));
        };
        if is_of_another_site(request) {
            return Err(forbidden("this request comes from another site\n"));
        }
        let mut confirmations = request.headers.get_all("x-buttress-confirm").iter();
        let is_confirmed = |value: &HeaderValue| {
            let value = value.as_bytes();
            value == circuit.as_bytes() || percent_decode(value).as_deref() == Some(circuit)
        };
        if !confirmations.next().is_some_and(is_confirmed) || confirmations.next().is_some() {
            let reason = "send the name of the circuit in the header x-buttress-confirm\n";
            return Err(forbidden(reason));
        }
        match catch_panic(|| guard(request)).flatten() {
            Some(sender) => Ok(sender.chars().filter(|c| !c.is_control()).take(MAX_NAME).collect()),
            None => Err(forbidden("the guard of the controls has declined the request\n")),
        }
    }

    /// Returns whether each host that the request names is allowed, and at least one is named.
    ///
    /// HTTP/2 has the host in the URI, HTTP/1 in the header, and a request to a proxy in both.
    fn is_host_allowed(&self, request: &Parts) -> bool {
        let mut hosts = hosts(request).peekable();
        hosts.peek().is_some() && hosts.all(|host| self.allows(host))
    }

    fn allows(&self, authority: &[u8]) -> bool {
        let Some(host) = std::str::from_utf8(authority).ok().and_then(host_of) else {
            return false;
        };
        let mut allowed = LOOPBACK_HOSTS.into_iter().chain(self.hosts.iter().map(String::as_str));
        allowed.any(|allowed| allowed.eq_ignore_ascii_case(host))
    }
}

/// Returns the hosts that a request names, with their ports.
fn hosts(request: &Parts) -> impl Iterator<Item = &[u8]> {
    let authority = request.uri.authority().map(|authority| authority.as_str().as_bytes());
    let headers = request.headers.get_all(header::HOST).iter().map(HeaderValue::as_bytes);
    authority.into_iter().chain(headers)
}

/// Returns the host of an authority, without its port. Returns `None` if the port is not a number.
fn host_of(authority: &str) -> Option<&str> {
    let end = match authority.starts_with('[') {
        true => authority.find(']')? + 1,
        false => authority.find(':').unwrap_or(authority.len()),
    };
    let (host, port) = authority.split_at(end);
    let is_port = match port.strip_prefix(':') {
        Some(digits) => !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit()),
        None => port.is_empty(),
    };
    is_port.then_some(host)
}

/// Returns whether a request can have this host, written without a port.
pub(super) fn is_host_name(name: &str) -> bool {
    let is_ipv6 = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'))
        .is_some_and(|address| address.parse::<std::net::Ipv6Addr>().is_ok());
    let is_name = !name.is_empty()
        && name.len() <= 253
        && name.bytes().all(|c| c.is_ascii_alphanumeric() || b"-._".contains(&c));
    is_ipv6 || is_name
}

fn is_forwarded(headers: &HeaderMap) -> bool {
    headers.keys().map(|key| key.as_str()).any(|key| {
        FORWARDED.contains(&key) || FORWARDED_PREFIXES.iter().any(|prefix| key.starts_with(prefix))
    })
}

/// Returns whether all known addresses of the peer are loopback addresses. Returns `None` if no address is known.
fn is_from_loopback(request: &Parts) -> Option<bool> {
    let own = request.extensions.get().map(|PeerAddr(peer)| peer.ip());
    #[cfg(feature = "axum")]
    let of_axum = request
        .extensions
        .get::<axum::extract::ConnectInfo<SocketAddr>>()
        .map(|axum::extract::ConnectInfo(peer)| peer.ip());
    #[cfg(not(feature = "axum"))]
    let of_axum = None::<IpAddr>;
    let mut peers = [own, of_axum].into_iter().flatten().peekable();
    peers.peek()?;
    // An IPv6 socket reports 127.0.0.1 as ::ffff:127.0.0.1.
    Some(peers.all(|peer: IpAddr| peer.to_canonical().is_loopback()))
}

/// Returns whether a browser reports that a page of another site has made the request.
///
/// Such a page cannot read the response, because the response permits no other origin. It could still use a control, or
/// occupy a stream.
///
/// Browsers send `sec-fetch-site` over HTTPS and to loopback addresses only. Without it, the `origin` decides, which they
/// send with a `POST` and with a stream of another origin.
pub(super) fn is_of_another_site(request: &Parts) -> bool {
    let mut sites = request.headers.get_all("sec-fetch-site").iter().peekable();
    if sites.peek().is_some() {
        return sites.any(|site| !matches!(site.as_bytes(), b"same-origin" | b"none"));
    }
    let is_own = |origin: &HeaderValue| {
        let origin = origin.as_bytes();
        let host = origin.windows(3).position(|part| part == b"://").map(|at| &origin[at + 3..]);
        host.is_some_and(|host| hosts(request).all(|own| own.eq_ignore_ascii_case(host)))
    };
    !request.headers.get_all(header::ORIGIN).iter().all(is_own)
}

/// Decodes a text in which `%` and two hexadecimal digits stand for a byte. Returns `None` if an encoded byte is
/// incomplete, or if the bytes are not UTF-8.
pub(super) fn percent_decode(encoded: &[u8]) -> Option<String> {
    let mut decoded = Vec::with_capacity(encoded.len());
    let mut rest = encoded;
    while let [first, tail @ ..] = rest {
        rest = match (first, tail) {
            (b'%', [high, low, tail @ ..]) => {
                let digit = |c: &u8| char::from(*c).to_digit(16);
                decoded.push(u8::try_from(digit(high)? * 16 + digit(low)?).ok()?);
                tail
            }
            (b'%', _) => return None,
            (first, tail) => {
                decoded.push(*first);
                tail
            }
        };
    }
    String::from_utf8(decoded).ok()
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access")
            .field("is_loopback", &self.is_loopback)
            .field("has_guard", &self.guard.is_some())
            .field("hosts", &self.hosts)
            .field("has_controls", &self.controls.is_some())
            .finish()
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_compared_without_their_ports() {
        for (authority, host) in [
            ("localhost", Some("localhost")),
            ("localhost:8080", Some("localhost")),
            ("[::1]", Some("[::1]")),
            ("[::1]:8080", Some("[::1]")),
            ("localhost:", None),
            ("localhost:80x", None),
            ("localhost:80:80", None),
            ("[::1", None),
            ("[::1]x", None),
            ("user@localhost", Some("user@localhost")),
            ("user:1@localhost", None),
            ("", Some("")),
        ] {
            assert_eq!(host_of(authority), host, "{authority}");
        }
        let access = Access { hosts: vec!["ops.example".to_owned()], ..Access::default() };
        for allowed in ["LocalHost:1", "127.0.0.1", "[::1]:99", "OPS.example:443"] {
            assert!(access.allows(allowed.as_bytes()), "{allowed}");
        }
        for foreign in
            ["", "evil.example", "localhost.evil.example", "user@localhost", "127.1", "localhost."]
        {
            assert!(!access.allows(foreign.as_bytes()), "{foreign}");
        }
        assert!(!access.allows(b"localhost\xff"));
    }

    #[test]
    fn host_names_have_no_scheme_and_no_port() {
        for name in ["ops.example", "10.0.0.7", "[fd00::7]", "my_host"] {
            assert!(is_host_name(name), "{name}");
        }
        for name in
            ["", "http://ops.example", "ops.example:80", "[fd00::7", "a b", "*", &"a".repeat(254)]
        {
            assert!(!is_host_name(name), "{name}");
        }
    }

    #[test]
    fn percent_encoding_is_decoded_or_invalid() {
        for (encoded, decoded) in [
            ("search", Some("search")),
            ("a%2Fb%20c", Some("a/b c")),
            ("%C3%A4", Some("ä")),
            ("%", None),
            ("%2", None),
            ("%2g", None),
            ("%+1", None),
            ("%ff", None),
        ] {
            assert_eq!(percent_decode(encoded.as_bytes()).as_deref(), decoded, "{encoded}");
        }
    }
}
