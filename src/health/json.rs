//! `application/health+json` (draft-inadarei-api-health-check-06). Reasons, times and durations are included only
//! `with_reasons`.

use crate::{
    endpoint::{EndpointBody, typed},
    json::JsonText,
};
use std::{
    fmt::Write,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::Response;

use super::{
    entry::{CheckSnapshot, CheckState, HealthStatus},
    response::status,
};

pub(super) fn json_response(
    all: HealthStatus,
    checks: &[CheckSnapshot],
    with_reasons: bool,
) -> Response<EndpointBody> {
    let now = SystemTime::now();
    let mut body = format!(r#"{{"status":"{all}""#);
    for (n, check) in checks.iter().enumerate() {
        body.push_str(if n == 0 { r#","checks":{"# } else { "," });
        object(&mut body, check, with_reasons, now);
    }
    body.push_str(if checks.is_empty() { "}" } else { "}}" });
    typed("application/health+json", status(all != HealthStatus::Fail), body.into())
}

fn object(body: &mut String, check: &CheckSnapshot, with_reasons: bool, now: SystemTime) {
    // The characters that a name may contain need no escapes in JSON.
    let CheckSnapshot { name, critical, .. } = check;
    let status = check.status();
    let mut write = |text: std::fmt::Arguments<'_>| {
        // Writing to a string does not fail.
        let _ = body.write_fmt(text);
    };
    write(format_args!(r#""{name}":[{{"status":"{status}","critical":{critical}"#));
    if let Some(healthy) = check.healthy {
        write(format_args!(r#","healthy":{healthy}"#));
    }
    // The duration and the time of a check reveal the network behind the process.
    if let Some(took) = check.took.filter(|_| with_reasons) {
        write(format_args!(r#","response_time_ms":{:.3}"#, took.as_secs_f64() * 1000.0));
    }
    if let Some(age) = check.age.filter(|_| with_reasons) {
        write(format_args!(r#","last_check":"{}""#, rfc3339(now.checked_sub(age).unwrap_or(now))));
    }
    let reason = match check.state {
        CheckState::Pass => None,
        CheckState::Unknown => Some("no verdict yet"),
        CheckState::Fail if with_reasons => {
            Some(check.reason.as_deref().unwrap_or("no reason given"))
        }
        CheckState::Fail => Some("reason withheld"),
    };
    if let Some(reason) = reason {
        write(format_args!(r#","output":{}"#, JsonText(reason)));
    }
    write(format_args!("}}]"));
}

/// Formats a time in UTC with milliseconds. Times before 1970 become 1970.
fn rfc3339(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (days, rest) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = date(days);
    let (hours, minutes, seconds) = (rest / 3600, rest / 60 % 60, rest % 60);
    let millis = since.subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hours:02}:{minutes:02}:{seconds:02}.{millis:03}Z")
}

/// Returns the Gregorian date of a day since 1970. The years of the computation begin in March, so that the leap day is
/// their last day (Hinnant, "chrono-compatible low-level date algorithms").
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let of_month = of_year - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + next, month, of_month)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn times_are_written_as_rfc_3339() {
        for (seconds, written) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (951_868_800, "2000-03-01T00:00:00.000Z"),
            (1_709_164_800, "2024-02-29T00:00:00.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), written);
        }
        // Against another implementation, a day in each of six hundred years.
        for n in 0..600 {
            let at = UNIX_EPOCH + Duration::from_secs(n * 31_556_952 + 12_345);
            let expected = httpdate::fmt_http_date(at);
            let written = rfc3339(at);
            assert_eq!(
                (&written[..4], &written[8..10], &written[11..19]),
                (&expected[12..16], &expected[5..7], &expected[17..25])
            );
        }
    }

    proptest! {
        #[test]
        fn fuzz_response_with_any_reason_is_json(reason in ".{0,40}", took in any::<Option<Duration>>()) {
            let check = CheckSnapshot {
                name: "db".to_owned(),
                state: CheckState::Fail,
                critical: true,
                healthy: Some(false),
                reason: Some(reason.clone()),
                age: took,
                took,
            };
            let response = json_response(HealthStatus::Fail, &[check], true);
            let json: serde_json::Value = serde_json::from_slice(response.body().bytes()).unwrap();
            let output = json["checks"]["db"][0]["output"].as_str().unwrap();
            let expected: String =
                reason.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            prop_assert_eq!(output, expected);
        }
    }
}
