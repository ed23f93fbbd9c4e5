//! Which point a person means: an id, `latest`, `latest-app`, or a time of the local clock.

use jiff::civil::{DateTime, Time};
use jiff::tz::TimeZone;
use jiff::{ToSpan, ZonedDateTime};

use crate::base::{Clock, Error, ErrorKind, PointId, Result, SystemClock, Timestamp};
use crate::host::api::types::PointSpec;

/// The local time of this moment.
pub fn now() -> ZonedDateTime {
    let now = jiff::Timestamp::from_millisecond(SystemClock::default().now().0).unwrap_or_default();
    now.to_zoned_datetime(TimeZone::system())
}

/// Understands `text`; times are in the zone of `now`. A time of day that is still to come today
/// means yesterday's.
pub fn point_spec(text: &str, now: &ZonedDateTime) -> Result<PointSpec> {
    let text = text.trim();
    match text {
        "latest" => return Ok(PointSpec::Latest),
        "latest-app" => return Ok(PointSpec::LatestApp),
        _ => {}
    }
    if let Ok(id) = text.parse::<PointId>() {
        return Ok(PointSpec::Id(id));
    }
    match instant(text, now) {
        Some(t) => Ok(PointSpec::At(Timestamp(t.as_millisecond()))),
        None => Err(Error::new(ErrorKind::Usage, format!("{text:?} names no point"))
            .why("a point is an id as 7-18349d3b, latest, latest-app, or a time as 14:00 or '2026-01-31 14:00'")
            .hint("see which there are: afterimage points NAME")),
    }
}

fn instant(text: &str, now: &ZonedDateTime) -> Option<jiff::Timestamp> {
    if let Ok(t) = text.parse::<jiff::Timestamp>() {
        return Some(t);
    }
    let zone = now.time_zone();
    // A date first: the parser of times of day takes a date with a time as well.
    if let Ok(moment) = text.parse::<DateTime>() {
        return at(moment, zone);
    }
    // With a colon, so that an id that is mistyped is never taken for an hour.
    let time = text.parse::<Time>().ok().filter(|_| text.contains(':'))?;
    let today = at(now.date().to_datetime(time), zone)?;
    if today <= now.timestamp() {
        return Some(today);
    }
    at(now.date().checked_sub(1.day()).ok()?.to_datetime(time), zone)
}

fn at(moment: DateTime, zone: &TimeZone) -> Option<jiff::Timestamp> {
    Some(moment.to_zoned_datetime(zone.clone()).ok()?.timestamp())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_text(text: &str) -> String {
        let now: ZonedDateTime = "2026-03-10T15:30:00+01:00[Europe/Berlin]".parse().unwrap();
        match point_spec(text, &now).unwrap() {
            PointSpec::At(t) => t.to_string(),
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn times_are_local_and_never_in_the_future() {
        assert_eq!(at_text("14:00"), "2026-03-10T13:00:00.000Z");
        assert_eq!(at_text("16:00"), "2026-03-09T15:00:00.000Z");
        assert_eq!(at_text("14:00:05"), "2026-03-10T13:00:05.000Z");
        assert_eq!(at_text("2026-01-31 14:00"), "2026-01-31T13:00:00.000Z");
        assert_eq!(at_text("2026-01-31T14:00:00Z"), "2026-01-31T14:00:00.000Z");
    }

    #[test]
    fn ids_and_words() {
        let now = ZonedDateTime::default();
        assert_eq!(point_spec("latest", &now).unwrap(), PointSpec::Latest);
        let id = "7-18349d3b".parse().unwrap();
        assert_eq!(point_spec("7-18349d3b", &now).unwrap(), PointSpec::Id(id));
        for bad in ["", "last", "7", "7-1834", "25:00", "tomorrow", "14"] {
            let e = point_spec(bad, &now).unwrap_err();
            assert_eq!(e.kind().exit_code(), 2, "{bad}");
        }
    }
}
