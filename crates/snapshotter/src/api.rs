//! containerd's API, generated from `proto/` by `cargo run -p snapshotter --example generate`.

pub(crate) use services::snapshots::v1 as snapshots;

/// Nested as the packages are: the generated code names one from the other that way.
mod services {
    pub(crate) mod snapshots {
        #[rustfmt::skip]
        #[expect(
            clippy::allow_attributes,
            clippy::allow_attributes_without_reason,
            clippy::too_many_lines,
            unused_qualifications,
            unreachable_pub,
            unnameable_types,
            reason = "generated code"
        )]
        pub(crate) mod v1;
    }
}

#[rustfmt::skip]
#[expect(unreachable_pub, reason = "generated code")]
pub(crate) mod types;
