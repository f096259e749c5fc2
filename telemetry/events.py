"""The names of log events, defined once. None of them ever carries SQL, parameters, results or credentials."""

from enum import StrEnum


class LogEvent(StrEnum):
    """What a log line is about."""

    # A service's life.
    SERVICE_STARTED = "service_started"
    SERVICE_READY = "service_ready"
    SERVICE_STOPPING = "service_stopping"
    SERVICE_STOPPED = "service_stopped"
    SERVICE_FAILED = "service_failed"
    SERVICE_RESTARTED = "service_restarted"
    TRACES_UNAVAILABLE = "traces_unavailable"
    # Kafka, Postgres or S3 away, and back.
    DEPENDENCY_UNAVAILABLE = "dependency_unavailable"
    DEPENDENCY_AVAILABLE = "dependency_available"
    SUBSCRIPTION_LOST = "subscription_lost"
    # One query's way.
    REQUEST_DEAD_LETTERED = "request_dead_lettered"
    QUERY_STARTED = "query_started"
    QUERY_FINISHED = "query_finished"
    QUERY_HANDED_BACK = "query_handed_back"
    QUERY_REAPED = "query_reaped"
    CANCEL_REQUESTED = "cancel_requested"
    ENGINE_CHILD_DIED = "engine_child_died"
    ENGINE_FAILED = "engine_failed"
    RESULT_REFUSED = "result_refused"
    AUDIT_REFUSED = "audit_refused"
    ERROR_DETAIL_LOST = "error_detail_lost"
    LEASE_LOST = "lease_lost"
    ROW_REFUSED = "row_refused"
    # The relay and the projector.
    RELAY_WAITING = "relay_waiting"
    STATUS_UNREADABLE = "status_unreadable"
    # Retention.
    RETENTION_SWEPT = "retention_swept"
    RETENTION_POSTPONED = "retention_postponed"
