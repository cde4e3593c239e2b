//! The protocols of a retry and a hedge: how requests are saved and replayed, and responses classified and discarded.
//!
//! | file | contents |
//! |---|---|
//! | `traits` | the two traits of a protocol, and the types of their methods |
//! | `http` | `http::Request` and `http::Response`, for HTTP and gRPC |
//! | `reqwest` | the types of reqwest |
//! | `any` | requests and responses of any type, classified by a closure |
//! | `classify` | the rules by which statuses, gRPC statuses and errors are retryable |
//! | `saved_request`, `saved_headers` | the saved request of HTTP |

mod any;
mod classify;
mod http;
#[cfg(feature = "reqwest")]
mod reqwest;
mod saved_headers;
mod saved_request;
mod traits;

#[cfg(feature = "reqwest")]
pub use self::reqwest::{PendingReqwest, Reqwest};
pub use self::{
    any::PendingResult,
    http::PendingResponse,
    saved_request::SavedRequest,
    traits::{AttemptNumber, AttemptResponse, ClassifyAttempt, Replay, ReplayRequest, SaveRules},
};
pub(crate) use self::{
    classify::{classify_by_request, failed_status},
    saved_request::keyed,
};
