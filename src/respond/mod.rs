//! TODO page

mod layer;
mod reject;

pub use self::layer::{RespondFuture, RespondLayer, RespondService};
pub use self::reject::{AsError, Reject, Respond, RespondWith};
pub(crate) use self::reject::{ResponseFormat, accepts, whole_seconds};
