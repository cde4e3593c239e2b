use std::fmt;

use http::{
    Uri,
    uri::{Authority, Scheme},
};

/// Scheme and authority, as the URI has them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    scheme: Option<Scheme>,
    authority: Option<Authority>,
}

impl Origin {
    /// Where this URI leads.
    #[must_use]
    pub fn of(uri: &Uri) -> Self {
        Self { scheme: uri.scheme().cloned(), authority: uri.authority().cloned() }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(scheme) = &self.scheme {
            write!(f, "{scheme}://")?;
        }
        f.write_str(self.authority.as_ref().map_or("", |authority| authority.as_str()))
    }
}
