//! The saved request of HTTP. It is made for every call, so its cost is kept low.

use std::fmt;

use http::{Extensions, HeaderMap, Method, Request, Uri, Version};

use super::super::{
    replay::{ReplayBody, ReplayHandle},
    verdict::{BodyReplay, SafeRequests},
};
use super::{saved_headers::SavedHeaders, traits::SaveRules};
use crate::{outcome::SentMark, time::Deadline};

/// A saved request: the head, and the saved part of the body.
pub struct SavedRequest<B> {
    method: Method,
    uri: Uri,
    headers: SavedHeaders,
    carried: Carried,
    version: Version,
    /// Further attempts carry a mark of their progress.
    pub(crate) marks: bool,
    pub(crate) body: ReplayHandle<B>,
}

impl<B> SavedRequest<B> {
    #[inline]
    pub(crate) fn of<T>(request: &Request<T>) -> Self {
        Self {
            method: request.method().clone(),
            uri: request.uri().clone(),
            headers: SavedHeaders::of(request.headers()),
            carried: Carried::of(request.extensions()),
            version: request.version(),
            marks: false,
            body: ReplayHandle::Empty,
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
        let sent = (self.marks && !self.body.is_empty()).then(SentMark::new);
        let mut request = self.request(self.body.replay().marked(sent.clone()));
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
        self.headers.get(name)
    }

    pub(crate) fn is_safe(&self, by: &SafeRequests) -> bool {
        is_safe(&self.method, by, || self.header(IDEMPOTENCY_KEY).is_some())
    }

    pub(crate) fn body_replay(&self) -> BodyReplay {
        self.body.body_replay()
    }
}

impl<B> fmt::Debug for SavedRequest<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SavedRequest").field("body", &self.body).finish_non_exhaustive()
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

impl SaveRules<'_> {
    #[inline]
    pub(crate) fn allow(&self, method: &Method, headers: &HeaderMap) -> bool {
        !self.is_off && self.safe_requests.is_none_or(|by| is_safe(method, by, || keyed(headers)))
    }
}

pub(crate) fn keyed(headers: &HeaderMap) -> bool {
    headers.contains_key(IDEMPOTENCY_KEY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saved_extensions_equal_the_original() {
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
}
