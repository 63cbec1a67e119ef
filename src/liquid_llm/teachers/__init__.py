"""The teacher side: online teachers, stored signal, the job that captures it, and the router between them."""
