//! What the registry does wrong, and when.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use oci::Digest;
use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use super::auth::Auth;

/// Which requests a fault meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All of them, the token endpoint too.
    Everything,
    /// Requests for manifests.
    Manifests,
    /// Requests for blobs: faults of the answer's head at the registry, faults of the body wherever
    /// the body is sent from.
    Blobs,
    /// Like [`Scope::Blobs`], of one blob.
    Blob(Digest),
    /// Requests that were redirected to the second listener.
    Cdn,
    /// Requests for a token.
    Token,
}

/// How often a fault happens. It counts the requests that it could have met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Times {
    /// The next so many.
    Next(u32),
    /// Until it is removed.
    Always,
    /// The pattern over and over: `[true, false, false]` meets every third request, beginning with
    /// the next. An empty one meets none.
    Pattern(Vec<bool>),
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// 429 with `Retry-After` (in whole seconds, rounded up).
    TooManyRequests {
        /// How long the client is told to wait.
        retry_after: Duration,
    },
    /// An answer with this status and an error document.
    Status(u16),
    /// The blob or manifest is not there: 404.
    NotFound,
    /// The connection is reset instead of an answer.
    ResetRequest,
    /// The answer begins this much later.
    Delay(Duration),
    /// A range request is answered with 200 and the whole blob.
    IgnoreRange,
    /// The answer has the right headers, but the connection is closed after so many bytes of body.
    Truncate {
        /// Bytes of body that arrive.
        after: u64,
    },
    /// Like [`Fault::Truncate`], with a TCP reset.
    ResetBody {
        /// Bytes of body that are sent; the reset may overtake them.
        after: u64,
    },
    /// After so many bytes nothing more comes, until [`Faults::release_stalled`].
    Stall {
        /// Bytes of body that arrive before.
        after: u64,
    },
    /// The byte at this offset of the blob is sent inverted. Requests that do not cover it are not met.
    FlipBlobByte {
        /// Offset in the blob, not in the body.
        offset: u64,
    },
    /// A byte of each body is sent inverted, whatever range it is.
    FlipBodyByte {
        /// Offset in the body; beyond its end the last byte is meant.
        offset: u64,
    },
}

/// How an outage looks from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outage {
    /// Nobody listens: connections are refused, those that exist are reset.
    Refuse,
    /// Connections are accepted and reset at once, those that exist too.
    Reset,
    /// Connections are made, and nothing is ever answered; bodies under way stop and go on after
    /// [`Faults::restore`].
    Silence,
}

/// The name of an injected fault, to remove it by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultId(u64);

/// Everything that is wrong with a registry; can be changed from any thread while it runs.
///
/// Clones are handles of the same registry's faults.
#[derive(Debug, Clone)]
pub struct Faults {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    rules: Mutex<Rules>,
    switches: Mutex<Switches>,
    outage: watch::Sender<OutageState>,
    /// For each listener that runs, up to which change of the outage it has followed.
    followers: Mutex<Vec<(SocketAddr, u64)>>,
    followed: Condvar,
    released: watch::Sender<u64>,
}

/// The outage at present, and how many changes led to it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct OutageState {
    pub(super) changes: u64,
    pub(super) outage: Option<Outage>,
}

#[derive(Debug, Default)]
struct Rules {
    last_id: u64,
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    id: FaultId,
    scope: Scope,
    times: Times,
    met: usize,
    fault: Fault,
}

#[derive(Debug, Clone)]
pub(super) struct Switches {
    pub(super) auth: Auth,
    /// Incremented with every change of `auth`, which makes earlier tokens worthless.
    pub(super) auth_epoch: u64,
    pub(super) redirect_blobs: bool,
    pub(super) referrers: bool,
}

/// What a request is about, to find out which faults meet it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subject {
    Other,
    Token,
    Manifest,
    Blob(Option<Digest>),
    CdnBlob(Option<Digest>),
}

/// What is to be done wrong before a body begins.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct HeadFaults {
    pub(super) delay: Duration,
    pub(super) instead: Option<Instead>,
}

/// What is done instead of answering.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Instead {
    TooManyRequests(Duration),
    Status(u16),
    NotFound,
    Reset,
}

/// How a body ends before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    Close,
    Reset,
    Stall,
}

/// What is to be done wrong while a body is sent. Offsets are of the body.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct BodyFaults {
    pub(super) stop: Option<(u64, Stop)>,
    pub(super) flipped: Vec<u64>,
}

impl Faults {
    pub(super) fn new(auth: Auth, referrers: bool) -> Self {
        let switches = Switches { auth, auth_epoch: 0, redirect_blobs: false, referrers };
        Self {
            shared: Arc::new(Shared {
                rules: Mutex::default(),
                switches: Mutex::new(switches),
                outage: watch::Sender::new(OutageState::default()),
                followers: Mutex::default(),
                followed: Condvar::new(),
                released: watch::Sender::new(0),
            }),
        }
    }

    /// Lets `fault` happen to the requests of `scope`, as often as `times` says.
    pub fn inject(&self, scope: Scope, times: Times, fault: Fault) -> FaultId {
        let mut rules = self.shared.rules.lock();
        rules.last_id += 1;
        let id = FaultId(rules.last_id);
        rules.rules.push(Rule { id, scope, times, met: 0, fault });
        id
    }

    /// Takes a fault back. Does nothing if it is used up.
    pub fn remove(&self, id: FaultId) {
        self.shared.rules.lock().rules.retain(|rule| rule.id != id);
    }

    /// Takes back all injected faults, releases stalled bodies and ends an outage. Leaves
    /// authentication, redirects and referrers as they are.
    pub fn clear(&self) {
        self.shared.rules.lock().rules.clear();
        self.release_stalled();
        self.restore();
    }

    /// Lets the bodies go on that [`Fault::Stall`] holds now.
    pub fn release_stalled(&self) {
        self.shared.released.send_modify(|generation| *generation += 1);
    }

    /// Answers the next `count` requests of `scope` with 429 and this `Retry-After`.
    pub fn too_many_requests(&self, scope: Scope, count: u32, retry_after: Duration) -> FaultId {
        self.inject(scope, Times::Next(count), Fault::TooManyRequests { retry_after })
    }

    /// Answers the next `count` requests of `scope` with this status.
    pub fn fail_next(&self, scope: Scope, count: u32, status: u16) -> FaultId {
        self.inject(scope, Times::Next(count), Fault::Status(status))
    }

    /// Pretends until further notice that there is no such blob.
    pub fn hide_blob(&self, blob: Digest) -> FaultId {
        self.inject(Scope::Blob(blob), Times::Always, Fault::NotFound)
    }

    /// Sends the byte at `offset` of `blob` inverted.
    pub fn flip_byte(&self, blob: Digest, offset: u64, times: Times) -> FaultId {
        self.inject(Scope::Blob(blob), times, Fault::FlipBlobByte { offset })
    }

    /// Whether all range requests are answered with 200 and the whole blob.
    pub fn ignore_ranges(&self, ignore: bool) {
        self.shared.rules.lock().rules.retain(|rule| rule.fault != Fault::IgnoreRange);
        if ignore {
            self.inject(Scope::Blobs, Times::Always, Fault::IgnoreRange);
        }
    }

    /// Changes what clients must prove. Tokens given out before are worthless afterwards.
    pub fn set_auth(&self, auth: Auth) {
        let mut switches = self.shared.switches.lock();
        switches.auth = auth;
        switches.auth_epoch += 1;
    }

    /// Makes all tokens that were given out worthless, as if they had expired.
    pub fn expire_tokens(&self) {
        self.shared.switches.lock().auth_epoch += 1;
    }

    /// Whether blobs are redirected (307) to the second listener.
    pub fn redirect_blobs(&self, redirect: bool) {
        self.shared.switches.lock().redirect_blobs = redirect;
    }

    /// Whether there is a referrers API. Without it the registry answers 404, as older ones do.
    pub fn referrers(&self, available: bool) {
        self.shared.switches.lock().referrers = available;
    }

    /// Begins an outage of both listeners. When this returns, new connections meet it.
    pub fn cut(&self, outage: Outage) {
        self.change_outage(Some(outage));
    }

    /// Ends an outage. When this returns, new connections are accepted.
    pub fn restore(&self) {
        self.change_outage(None);
    }

    fn change_outage(&self, outage: Option<Outage>) {
        let mut changes = 0;
        self.shared.outage.send_modify(|state| {
            state.changes += 1;
            state.outage = outage;
            changes = state.changes;
        });
        let mut followers = self.shared.followers.lock();
        while followers.iter().any(|&(_listener, seen)| seen < changes) {
            self.shared.followed.wait(&mut followers);
        }
    }

    /// Makes [`Faults::cut`] and [`Faults::restore`] wait for a listener, until the answer is dropped.
    pub(super) fn follow(&self, listener: SocketAddr) -> Follower {
        let changes = self.shared.outage.borrow().changes;
        self.shared.followers.lock().push((listener, changes));
        Follower { listener, shared: Arc::clone(&self.shared) }
    }

    pub(super) fn switches(&self) -> Switches {
        self.shared.switches.lock().clone()
    }

    pub(super) fn watch_outage(&self) -> watch::Receiver<OutageState> {
        self.shared.outage.subscribe()
    }

    pub(super) fn watch_released(&self) -> watch::Receiver<u64> {
        self.shared.released.subscribe()
    }

    /// The faults of the answer's head that this request meets; uses them up.
    pub(super) fn take_head(&self, subject: Subject) -> HeadFaults {
        let mut found = HeadFaults::default();
        self.shared.rules.lock().each(|rule| {
            if !rule.scope.meets_head(subject) {
                return;
            }
            let instead = match rule.fault {
                Fault::Delay(delay) => {
                    if rule.happens() {
                        found.delay += delay;
                    }
                    return;
                }
                Fault::TooManyRequests { retry_after } => Instead::TooManyRequests(retry_after),
                Fault::Status(status) => Instead::Status(status),
                Fault::NotFound => Instead::NotFound,
                Fault::ResetRequest => Instead::Reset,
                Fault::IgnoreRange
                | Fault::Truncate { .. }
                | Fault::ResetBody { .. }
                | Fault::Stall { .. }
                | Fault::FlipBlobByte { .. }
                | Fault::FlipBodyByte { .. } => return,
            };
            // One request is refused for one reason; the next reason waits for the next request.
            if found.instead.is_none() && rule.happens() {
                found.instead = Some(instead);
            }
        });
        found
    }

    /// Whether this range request is to be answered with the whole blob; uses the fault up.
    pub(super) fn take_ignore_range(&self, subject: Subject) -> bool {
        let mut ignore = false;
        self.shared.rules.lock().each(|rule| {
            if rule.fault == Fault::IgnoreRange && rule.scope.meets_body(subject) {
                ignore |= rule.happens();
            }
        });
        ignore
    }

    /// The faults of a body of `len` bytes that begins at `start` of the blob; uses them up.
    pub(super) fn take_body(&self, subject: Subject, start: u64, len: u64) -> BodyFaults {
        let mut found = BodyFaults::default();
        if len == 0 {
            return found;
        }
        self.shared.rules.lock().each(|rule| {
            if !rule.scope.meets_body(subject) {
                return;
            }
            let stop = match rule.fault {
                Fault::Truncate { after } => (after, Stop::Close),
                Fault::ResetBody { after } => (after, Stop::Reset),
                Fault::Stall { after } => (after, Stop::Stall),
                Fault::FlipBlobByte { offset } => {
                    let covered = offset.checked_sub(start).filter(|&at| at < len);
                    found.flipped.extend(covered.filter(|_| rule.happens()));
                    return;
                }
                Fault::FlipBodyByte { offset } => {
                    found.flipped.extend(rule.happens().then(|| offset.min(len - 1)));
                    return;
                }
                Fault::TooManyRequests { .. }
                | Fault::Status(_)
                | Fault::NotFound
                | Fault::ResetRequest
                | Fault::Delay(_)
                | Fault::IgnoreRange => return,
            };
            if found.stop.is_none() && stop.0 < len && rule.happens() {
                found.stop = Some(stop);
            }
        });
        found
    }
}

/// A listener that follows outages.
#[derive(Debug)]
pub(super) struct Follower {
    listener: SocketAddr,
    shared: Arc<Shared>,
}

impl Follower {
    /// The listener does what was asked for with this change.
    pub(super) fn has_followed(&self, changes: u64) {
        let mut followers = self.shared.followers.lock();
        for (listener, seen) in followers.iter_mut() {
            if *listener == self.listener {
                *seen = changes;
            }
        }
        self.shared.followed.notify_all();
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.shared.followers.lock().retain(|(listener, _seen)| *listener != self.listener);
        self.shared.followed.notify_all();
    }
}

impl Rules {
    fn each(&mut self, mut visit: impl FnMut(&mut Rule)) {
        self.rules.iter_mut().for_each(&mut visit);
        self.rules.retain(|rule| rule.times != Times::Next(0));
    }
}

impl Rule {
    /// Whether the request that is just being served is one of those; counts it.
    fn happens(&mut self) -> bool {
        self.met += 1;
        match &mut self.times {
            Times::Next(0) => false,
            Times::Next(left) => {
                *left -= 1;
                true
            }
            Times::Always => true,
            Times::Pattern(pattern) if pattern.is_empty() => false,
            Times::Pattern(pattern) => pattern[(self.met - 1) % pattern.len()],
        }
    }
}

impl Scope {
    fn meets_head(self, subject: Subject) -> bool {
        match (self, subject) {
            (Self::Everything, _)
            | (Self::Manifests, Subject::Manifest)
            | (Self::Blobs, Subject::Blob(_))
            | (Self::Cdn, Subject::CdnBlob(_))
            | (Self::Token, Subject::Token) => true,
            (Self::Blob(one), Subject::Blob(other)) => Some(one) == other,
            _ => false,
        }
    }

    fn meets_body(self, subject: Subject) -> bool {
        match (self, subject) {
            (Self::Blobs, Subject::CdnBlob(_)) => true,
            (Self::Blob(one), Subject::CdnBlob(other)) => Some(one) == other,
            _ => self.meets_head(subject),
        }
    }
}
