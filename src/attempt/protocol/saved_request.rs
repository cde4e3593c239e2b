//! The saved request of HTTP. It is made for every call, so its cost is kept low.

use std::fmt;

use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version};

use super::super::{
    replay::{ReplayBody, Tape},
    verdict::{BodyReplay, SafeRequests},
};
use super::Rules;
use crate::{outcome::SentMark, time::Deadline};

/// A saved request: the head, and the saved part of the body.
pub struct SavedRequest<B> {
    method: Method,
    uri: Uri,
    headers: Lines,
    carried: Carried,
    version: Version,
    /// Further attempts carry a mark of their progress.
    pub(crate) marks: bool,
    pub(crate) tape: Tape<B>,
}

impl<B> SavedRequest<B> {
    #[inline]
    pub(crate) fn of<T>(request: &Request<T>) -> Self {
        Self {
            method: request.method().clone(),
            uri: request.uri().clone(),
            headers: Lines::of(request.headers()),
            carried: Carried::of(request.extensions()),
            version: request.version(),
            marks: false,
            tape: Tape::Empty,
        }
    }

    pub(crate) fn request<T>(&self, body: T) -> Request<T> {
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        *request.version_mut() = self.version;
        *request.extensions_mut() = self.carried.extensions();
        *request.headers_mut() = self.headers.map();
        request
    }

    /// Returns the request for another attempt, with an extension that identifies the attempt and a mark of its own
    /// progress.
    pub(crate) fn marked<T>(&self, attempt: T) -> Request<ReplayBody<B>>
    where
        T: Clone + Send + Sync + 'static,
    {
        let sent = (self.marks && !self.tape.is_empty()).then(SentMark::new);
        let mut request = self.request(self.tape.replay().marked(sent.clone()));
        request.extensions_mut().insert(attempt);
        if let Some(sent) = sent {
            request.extensions_mut().insert(sent);
        }
        request
    }

    pub(crate) fn deadline(&self) -> Option<Deadline> {
        match &self.carried {
            Carried::Deadline(deadline) => Some(*deadline),
            Carried::All(extensions) => Deadline::of(extensions),
        }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&[u8]> {
        self.headers.iter().find(|line| line.name == name.as_bytes()).map(|line| line.value)
    }

    pub(crate) fn safe(&self, by: &SafeRequests) -> bool {
        is_safe(&self.method, by, || self.header(IDEMPOTENCY_KEY).is_some())
    }

    pub(crate) fn repeatable(&self) -> BodyReplay {
        self.tape.repeatable()
    }
}

impl<B> fmt::Debug for SavedRequest<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SavedRequest").field("tape", &self.tape).finish_non_exhaustive()
    }
}

// ===== Extensions =====

/// The saved extensions. Most requests have only a deadline, for which a copy of the map would cost three allocations.
enum Carried {
    Deadline(Deadline),
    All(Extensions),
}

impl Carried {
    #[inline]
    fn of(extensions: &Extensions) -> Self {
        match Deadline::of(extensions) {
            Some(deadline) if extensions.len() == 1 => Self::Deadline(deadline),
            _ => Self::All(extensions.clone()),
        }
    }

    fn extensions(&self) -> Extensions {
        match self {
            Self::All(extensions) => extensions.clone(),
            Self::Deadline(deadline) => {
                let mut extensions = Extensions::new();
                extensions.insert(*deadline);
                extensions
            }
        }
    }
}

// ===== Safety =====

pub(crate) const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// Returns whether a request is safe to repeat: by its method (RFC 9110 §9.2.2), or by an `Idempotency-Key`. All
/// attempts carry the same key, by which the server recognises repetitions.
pub(crate) fn is_safe(method: &Method, by: &SafeRequests, keyed: impl FnOnce() -> bool) -> bool {
    let idempotent = match by {
        SafeRequests::All => true,
        SafeRequests::Methods(methods) => methods.contains(method),
        SafeRequests::Idempotent => matches!(
            *method,
            Method::GET
                | Method::HEAD
                | Method::OPTIONS
                | Method::TRACE
                | Method::PUT
                | Method::DELETE
        ),
    };
    idempotent || keyed()
}

impl Rules<'_> {
    #[inline]
    pub(crate) fn keeps(&self, method: &Method, headers: &HeaderMap) -> bool {
        !self.never && self.only.is_none_or(|by| is_safe(method, by, || keyed(headers)))
    }
}

pub(crate) fn keyed(headers: &HeaderMap) -> bool {
    headers.contains_key(IDEMPOTENCY_KEY)
}

// ===== Headers =====

/// The saved headers, one after the other, as text in one allocation, or two if they are long. A copy of the map would
/// cost two allocations, an atomic operation for each value, and one more allocation for each value that has not been
/// shared before. Most saved headers are never read.
struct Lines(Vec<u8>);

struct Line<'a> {
    name: &'a [u8],
    value: &'a [u8],
    sensitive: bool,
}

/// The length of the prefix of a header: the length of the name, and the length of the value with a bit for
/// `sensitive`.
const PREFIX: usize = 2 + 8;

impl Lines {
    #[inline]
    fn of(headers: &HeaderMap) -> Self {
        if headers.is_empty() { Self(Vec::new()) } else { Self::written(headers) }
    }

    fn written(headers: &HeaderMap) -> Self {
        // Enough for most requests. Computing the exact size would read every header twice.
        let mut text = Vec::with_capacity(headers.len() * 64);
        for (name, value) in headers {
            let (name, sensitive) = (name.as_str(), value.is_sensitive());
            let mut prefix = [0; PREFIX];
            // The length fits: `HeaderName` permits at most 65,535 bytes.
            prefix[..2].copy_from_slice(&(name.len() as u16).to_ne_bytes());
            let length = (value.len() as u64) << 1 | u64::from(sensitive);
            prefix[2..].copy_from_slice(&length.to_ne_bytes());
            text.extend_from_slice(&prefix);
            text.extend_from_slice(name.as_bytes());
            text.extend_from_slice(value.as_bytes());
        }
        Self(text)
    }

    fn iter(&self) -> impl Iterator<Item = Line<'_>> {
        let mut rest = &*self.0;
        std::iter::from_fn(move || {
            let (name, after) = rest.split_first_chunk::<2>()?;
            let (value, after) = after.split_first_chunk::<8>()?;
            let (name, value) = (u16::from_ne_bytes(*name), u64::from_ne_bytes(*value));
            let sensitive = value & 1 == 1;
            let (name, after) = after.split_at_checked(usize::from(name))?;
            let (value, after) = after.split_at_checked(usize::try_from(value >> 1).ok()?)?;
            rest = after;
            Some(Line { name, value, sensitive })
        })
    }

    fn map(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for Line { name, value, sensitive } in self.iter() {
            // Name and value were valid when they were saved.
            let name = HeaderName::from_bytes(name);
            let (Ok(name), Ok(mut value)) = (name, HeaderValue::from_bytes(value)) else {
                continue;
            };
            value.set_sensitive(sensitive);
            headers.append(name, value);
        }
        headers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_come_back_as_they_were() {
        let deadline = Deadline::after(std::time::Duration::from_secs(1));
        for (deadline, other) in [(None, None), (Some(deadline), None), (None, Some(7))] {
            for other in [other, Some(9)] {
                let mut extensions = Extensions::new();
                deadline.map(|deadline| extensions.insert(deadline));
                other.map(|other: u32| extensions.insert(other));
                let back = Carried::of(&extensions).extensions();
                assert_eq!(back.len(), extensions.len());
                assert_eq!(Deadline::of(&back), deadline);
                assert_eq!(back.get(), other.as_ref());
            }
        }
    }

    #[test]
    fn headers_come_back_as_they_were() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("host", "example.com"),
            ("set-cookie", "a=1"),
            ("x-of-my-own", ""),
            ("set-cookie", "b=2"),
            ("accept", "*/*"),
        ] {
            headers.append(HeaderName::from_static(name), value.parse().unwrap());
        }
        let mut secret = HeaderValue::from_bytes(b"\xfftoken").unwrap();
        secret.set_sensitive(true);
        headers.insert("authorization", secret);
        headers.insert("x-long", "v".repeat(100_000).parse().unwrap());
        let back = Lines::of(&headers).map();
        assert_eq!(back, headers);
        assert!(back["authorization"].is_sensitive() && !back["host"].is_sensitive());
        let cookies: Vec<_> = back.get_all("set-cookie").iter().collect();
        assert_eq!(cookies, ["a=1", "b=2"], "in their order");
        assert_eq!(Lines::of(&HeaderMap::new()).map(), HeaderMap::new());
    }
}
