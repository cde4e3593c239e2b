//! Request bodies that are saved while they are sent: `body` has the bodies of the attempts and their shared state,
//! `buffer` the saved data.

mod body;
mod buffer;

pub use self::body::ReplayBody;
pub(crate) use self::body::ReplayHandle;
